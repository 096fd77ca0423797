"""What trains, measures and draws with the core, which imports nothing from here."""

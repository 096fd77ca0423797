"""What a type checker makes of the public names: mypy reads this file in `make lint`, and nothing runs it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import sire_fast
from sire_fast.functional import swap_rnn
from sire_fast.reference import SwapRNN


class Model(nn.Module):
    gru: nn.GRU


model = Model()
assert_type(sire_fast.convert(model, sire_fast.swaps.Uniform(4), compare="end", weight=0.1), Model)
assert_type(sire_fast.convert(nn.LSTM(3, 5), weight=lambda: 0.1), nn.LSTM)
assert_type(sire_fast.revert(model), Model)
assert_type(sire_fast.penalty(model, through=nn.Linear(5, 1)), Tensor)
assert_type(sire_fast.swap_penalty(lambda x: x.sum(0), torch.ones(7, 4, 3), sire_fast.swaps.Adjacent("all")), Tensor)

layer = sire_fast.GRU(3, 5, batch_first=True, swaps=sire_fast.swaps.Adjacent(8), compare="swap", weight=0.1)
as_torchs: nn.GRU = layer
assert_type(layer(torch.ones(4, 7, 3)), Any)  # as of every module
assert_type(layer.why_not_fused(), list[str])
assert_type(layer.backend, str)

x, w, h = torch.ones(7, 4, 5), torch.ones(5, 5), torch.ones(4, 5)
assert_type(swap_rnn("rnn_tanh", x, w, None, h, swaps=sire_fast.swaps.Uniform(2)(7, 4)), SwapRNN)
assert_type(sire_fast.inspect(layer, x).worst, Tensor)
as_weight: Callable[[], float] = sire_fast.schedules.AdaptiveWeight(0.1)

sire_fast.convert("model")  # type: ignore[type-var]
sire_fast.GRU(3, 5, swaps=8)  # type: ignore[arg-type]

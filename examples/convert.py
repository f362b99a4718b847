"""A Pre-LN model becomes its equal Pre-RMSNorm twin, in place.

python examples/convert.py
"""

import torch
from torch import nn

import effkern

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=True)
model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(64), enable_nested_tensor=False).eval()
x = torch.randn(2, 10, 64)
before = model(x)

result = effkern.convert.to_rmsnorm(model, (x,))
print(result.report)
print("largest difference:", (model(x) - before).abs().max().item())

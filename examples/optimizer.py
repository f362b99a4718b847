"""A drop-in optimizer: one line changes.

python examples/optimizer.py
"""

import torch

import effkern

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 1))
inputs = torch.randn(256, 32)
targets = inputs.sin().sum(dim=1, keepdim=True)

# was: torch.optim.AdamW(model.parameters(), lr=3e-3)
optimizer = effkern.FusedAdamW(model.parameters(), lr=3e-3)

for step in range(200):
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(model(inputs), targets)
    loss.backward()
    optimizer.step()
    if step % 50 == 0 or step == 199:
        print(f"step {step}: loss {loss.item():.4f}")

# The state is torch's: it loads into the class that it stands for, and back.
stock = torch.optim.AdamW(model.parameters(), lr=3e-3)
stock.load_state_dict(optimizer.state_dict())

"""Faster training of flash-linear-attention's Mamba-2 without the package `mamba_ssm`. To be imported before use.

Without that package, its layers compute the scan with plain products, whose intermediate results are hundreds of times
as large as their inputs. The scan is a gated linear attention with one decay a head, for which flash-linear-attention
has kernels: queries `C`, keys `B`, values `Δ x` and log decays `Δ A` (Dao and Gu 2024, section 6). Recipes name this
module in `import_packages`.
"""

import torch
from fla.layers.mamba2 import Mamba2
from fla.ops.simple_gla import fused_recurrent_simple_gla
from torch.nn import functional as F


plain_forward = Mamba2.torch_forward


def scan(x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """
    `h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_tᵀ`, `y_t = h_tᵀ C_t`.

    Args:
        x (`torch.Tensor` of shape `(B, T, H, P)`): inputs.
        dt (`torch.Tensor` of shape `(B, T, H)`): steps.
        A (`torch.Tensor` of shape `(H,)`): decays, negative.
        B, C (`torch.Tensor` of shape `(B, T, H, N)`): what writes and reads the state.

    Returns:
        `torch.Tensor` of shape `(B, T, H, P)`.
    """
    values = (x * dt[..., None]).to(x.dtype)
    # Not its kernels for chunks, whose gradients are wrong on Hopper GPUs with Triton 3.4 to 3.7.0.
    return fused_recurrent_simple_gla(C.contiguous(), B.contiguous(), values, g=dt * A, scale=1.0)[0]


def forward(self, input_states, last_state=None, use_cache=False, attention_mask=None):
    """`Mamba2.torch_forward` by kernels where whole rows are trained on, and as it was otherwise."""
    if last_state is not None or use_cache or attention_mask is not None or self.n_groups != 1:
        return plain_forward(self, input_states, last_state, use_cache, attention_mask)
    length = input_states.shape[1]
    sizes = [self.intermediate_size, self.conv_dim, self.num_heads]
    gate, xBC, dt = self.in_proj(input_states).split(sizes, dim=-1)
    xBC = self.act(self.conv1d(xBC.transpose(1, 2))[..., :length].transpose(1, 2))
    x, B, C = xBC.split([self.intermediate_size, self.ssm_state_size, self.ssm_state_size], dim=-1)
    x = x.unflatten(-1, (self.num_heads, self.head_dim))  # (B, T, H, P)
    B, C = (each[:, :, None].expand(-1, -1, self.num_heads, -1) for each in (B, C))  # (B, T, H, N)
    dt = F.softplus(dt.float() + self.dt_bias.float()).clamp(*self.dt_limit)
    y = scan(x, dt, -self.A_log.float().exp(), B, C).float() + self._get_D(True) * x.float()
    y = y.flatten(-2)  # (B, T, H, P) -> (B, T, H * P)
    y = self.norm(y, gate) if self.rmsnorm else y * self.act(gate)
    return self.out_proj(y.to(input_states.dtype)), None, None


Mamba2.torch_forward = forward

import pytest
import torch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_scan_of_kernels_is_that_of_plain_products():
    """Outputs and every gradient, of a layer whose length is no multiple of a chunk."""
    pytest.importorskip("fla", reason="flash-linear-attention is missing: the extra `bench`")
    import mamba2_scan

    torch.manual_seed(0)
    sizes = {"num_heads": 4, "head_dim": 32, "hidden_size": 64, "state_size": 16, "expand": 2, "n_groups": 1}
    layer = mamba2_scan.Mamba2(**sizes, chunk_size=32, layer_idx=0).cuda()
    x = torch.randn(2, 77, 64, device="cuda", requires_grad=True)
    results = []
    for forward in (mamba2_scan.plain_forward, mamba2_scan.forward):
        output = forward(layer, x)[0]
        results.append([output, *torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])])
    for expected, actual in zip(*results):
        assert (actual - expected).norm() < 1e-3 * expected.norm()

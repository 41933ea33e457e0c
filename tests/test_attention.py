"""attention() against plain softmax attention in float64, on every way through it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.models import attention as module
from sdjax.models.attention import attention, blocked, imagewise, plain


def arrays(b, s, t, h, d, size=1.0):
    rng = np.random.default_rng(s * t + d)
    shapes = ((b, s, h, d), (b, t, h, d), (b, t, h, d))
    return [jnp.asarray(size * rng.standard_normal(shape), jnp.float32) for shape in shapes]


def exact(q, k, v, causal=False, scale=None):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    scores = np.einsum("bshd,bthd->bhst", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        scores[..., ~np.tri(*scores.shape[-2:], dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhst,bthd->bshd", weights / weights.sum(-1, keepdims=True), v)


CASES = [
    ((2, 77, 77, 3, 16), True),
    ((1, 1024, 77, 2, 40), False),
    ((1, 600, 521, 2, 40), False),
    ((1, 1024, 520, 1, 16), True),
    ((1, 513, 8300, 1, 4), False),
]


@pytest.mark.parametrize(("shape", "causal"), CASES)
def test_attention_equals_softmax_attention_in_float64(shape, causal):
    q, k, v = arrays(*shape)
    got = jax.jit(attention, static_argnames="causal")(q, k, v, causal=causal)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, exact(q, k, v, causal), atol=2e-6)


def test_large_scores_neither_overflow_nor_lose_the_largest():
    q, k, v = arrays(1, 600, 600, 1, 16, size=30.0)
    got = attention(q, k, v)
    # Scores reach thousands, where float32 is 2e-4 apart: so much of a value is uncertain.
    np.testing.assert_allclose(got, exact(q, k, v), atol=3e-4 * np.abs(v).max())


def test_a_scale_replaces_the_square_root():
    q, k, v = arrays(1, 600, 521, 1, 16)
    np.testing.assert_allclose(attention(q, k, v, scale=0.1), exact(q, k, v, scale=0.1), atol=2e-6)


@pytest.mark.parametrize("s", [77, 1024])
def test_bfloat16_keeps_its_dtype_and_a_float32_softmax(s):
    q, k, v = (jnp.asarray(a, jnp.bfloat16) for a in arrays(1, s, s, 2, 40))
    got = attention(q, k, v)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float32), exact(q, k, v), atol=0.02)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_the_blocked_loop_equal_those_of_the_plain_form(causal):
    q, k, v = arrays(1, 600, 521, 2, 8)

    def loss(f):
        return lambda *a: jnp.sum(jnp.sin(f(*a)))

    ours = jax.jit(jax.grad(loss(lambda *a: attention(*a, causal=causal)), (0, 1, 2)))(q, k, v)
    theirs = jax.jit(jax.grad(loss(lambda *a: plain(*a, causal, 8**-0.5)), (0, 1, 2)))(q, k, v)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * float(np.abs(b).max()) + 1e-6)


def test_forward_derivatives_work():
    q, k, v = arrays(1, 600, 521, 1, 8)
    _, ours = jax.jvp(lambda q: attention(q, k, v), (q,), (jnp.ones_like(q),))
    _, theirs = jax.jvp(lambda q: plain(q, k, v, False, 8**-0.5), (q,), (jnp.ones_like(q),))
    np.testing.assert_allclose(ours, theirs, atol=3e-6)


def test_a_batch_of_batches_can_be_mapped():
    q, k, v = (jnp.stack([a, 2 * a]) for a in arrays(1, 600, 521, 1, 8))
    got = jax.vmap(attention)(q, k, v)
    np.testing.assert_allclose(got[1], exact(q[1], k[1], v[1]), atol=4e-6)


def test_only_the_platform_of_the_program_is_compiled():
    q, k, v = arrays(2, 1500, 521, 1, 8)
    cpu = jax.jit(attention).trace(q, k, v).lower(lowering_platforms=("cpu",)).as_text()
    tpu = jax.jit(attention).trace(q, k, v).lower(lowering_platforms=("tpu",)).as_text()
    assert cpu.count("stablehlo.while") == 2 and "1500x521xf32" not in cpu
    assert tpu.count("stablehlo.while") == 2 and "1x1500x521xf32" in tpu


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("most", [2**26, 4 * 2 * 300 * 256])
@pytest.mark.parametrize("s", [300, 1024])
def test_the_form_for_tpus_equals_the_others(monkeypatch, s, most, causal):
    monkeypatch.setattr(module, "_FAST_BYTES", most)
    q, k, v = arrays(2, s, 300, 2, 8)
    got = jax.jit(lambda *a: imagewise(*a, causal, 8**-0.5))(q, k, v)
    np.testing.assert_allclose(got, exact(q, k, v, causal), atol=2e-6)


def test_a_short_text_is_computed_plainly():
    q, k, v = arrays(1, 256, 77, 1, 8)
    assert 256 * 77 < module._FEW_SCORES
    np.testing.assert_allclose(attention(q, k, v), blocked(q, k, v, False, 8**-0.5), atol=2e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_blocks_of_queries_and_pieces_of_keys_change_nothing(monkeypatch, causal):
    monkeypatch.setattr(module, "_BLOCK", 128)
    monkeypatch.setattr(module, "_KEYS", 100)
    q, k, v = arrays(1, 300, 300, 2, 8)
    got = jax.jit(lambda *a: blocked(*a, causal, 8**-0.5))(q, k, v)
    np.testing.assert_allclose(got, exact(q, k, v, causal), atol=2e-6)


@pytest.mark.parametrize(("dtype", "flash"), [(jnp.bfloat16, True), (jnp.float32, False)])
def test_programs_for_a_gpu_call_cudnns_flash_attention_both_ways(monkeypatch, dtype, flash):
    """Lowered for CUDA without one: the calls are there with operands that jax accepts.

    77 tokens of text are an odd number, whose gradients jax refuses: they go another way.
    """
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda *_: True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    image, text = (jax.ShapeDtypeStruct((2, n, 8, 40), dtype) for n in (4096, 77))

    def lowered(function, key):
        traced = jax.jit(function).trace(image, key, key)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    def loss(q, k, v):
        return attention(q, k, v).astype(jnp.float32).sum()

    for key in (image, text):
        asked = flash and key is image
        assert ("__cudnn$fmhaSoftmax(" in lowered(attention, key)) == asked
        backward = lowered(jax.grad(loss, (0, 1, 2)), key)
        assert ("__cudnn$fmhaSoftmaxBackward(" in backward) == asked

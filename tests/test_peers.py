"""tools/peers: re-implementations against examples worked out by hand, bits, and the table."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the peers need torch: make sglang installs it")
pytest.importorskip("transformers", reason="kvcodec eval needs it: make sglang installs it")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from peers import (  # noqa: E402
    __main__ as command,
)
from peers import (  # noqa: E402
    cachegen,
    casts,
    kivi,
    kvtuner,
    nvfp4,
    speed,
    statement,
    tables,
    turboquant,
)
from peers.base import Peer, bits_of  # noqa: E402
from peers.packing import pack, unpack  # noqa: E402

from kvcodec.eval.protocol import PageCodec  # noqa: E402
from kvcodec.spec import PRESETS, CodecSpec  # noqa: E402

PACKAGES = ROOT / ".venv" / "peers"
DOCUMENT = ROOT / "docs" / "measurements" / "peers.json"
PAGES = [ROOT / "docs" / "quality.md", ROOT / "docs" / "peers.md"]
REWRITTEN: list[Peer] = [
    *kvtuner.peers(),
    *kivi.peers(),
    *turboquant.peers(),
    *nvfp4.peers(),
    *cachegen.peers(),
    *casts.peers(),
]


def named(name: str) -> Peer:
    return next(peer for peer in REWRITTEN if peer.name == name)


def random_pages(count: int = 2, seed: int = 3):
    """Keys and values (pages, layers, heads, tokens, head size)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, 2, 2, 64, 128, generator=generator).bfloat16()


def bits_per_value(peer: Peer, count: int = 1) -> float:
    keys, values = random_pages(count)
    return peer.roundtrip_pages(keys, values).stored_bits / (2 * keys.numel())


# --- what all have in common


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_numbers_come_back_and_take_their_bits(bits: int):
    numbers = (torch.arange(7 * 64).reshape(7, 64) * 5 % 2**bits).to(torch.uint8)
    stored = pack(numbers, bits)
    assert bits_of(stored) == bits * numbers.numel()
    assert torch.equal(unpack(stored, bits), numbers)


def test_packing_puts_low_bits_first():
    assert pack(torch.tensor([1, 2, 3, 0], dtype=torch.uint8), 2).tolist() == [0b00_11_10_01]
    assert pack(torch.tensor([1, 15], dtype=torch.uint8), 4).tolist() == [0xF1]
    three = pack(torch.tensor([1, 0, 0, 0, 0, 0, 0, 7], dtype=torch.uint8), 3)
    assert three.tolist() == [1, 0, 0b1110_0000]


@pytest.mark.parametrize("peer", REWRITTEN, ids=lambda peer: peer.name)
def test_pages_are_coded_alone(peer: Peer):
    """What comes back of a page does not depend on the others, nor do its bits."""
    keys, values = random_pages(2 * peer.pages)
    whole = peer.roundtrip_pages(keys, values)
    assert isinstance(peer, PageCodec) and whole.keys.dtype == keys.dtype
    halves = [
        peer.roundtrip_pages(*pair) for pair in zip(keys.chunk(2), values.chunk(2), strict=True)
    ]
    assert torch.equal(whole.keys, torch.cat([half.keys for half in halves]))
    assert torch.equal(whole.values, torch.cat([half.values for half in halves]))
    assert whole.stored_bits == sum(half.stored_bits for half in halves)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("KVTuner KV8 per token", 8 + 32 / 128),
        ("KVTuner KV2 per token", 8 + 32 / 128),
        ("KVTuner KIVI g32 KV4", 8 + 32 / 32),
        ("KIVI 4 bit g64", 4 + 32 / 64),
        ("KIVI 4 bit g32", 4 + 32 / 32),
        ("KIVI 2 bit g64", 2 + 32 / 64),
        ("KIVI 2 bit g32", 2 + 32 / 32),
        ("TurboQuant-mse 4 bit", 4 + 16 / 128),
        ("TurboQuant k8v4", (8 + 4 + 32 / 128) / 2),
        ("TurboQuant 3bit_nc", (3 + 16 / 128 + 3 + 32 / 128) / 2),
        ("NVFP4", 4 + 8 / 16 + 32 / (2 * 64 * 128)),
        ("fp8 e4m3, no scale", 8),
    ],
)
def test_bits_count_all_metadata(name: str, bits: float):
    assert bits_per_value(named(name)) == pytest.approx(bits, abs=1e-12)


# --- one by one


def test_kvtuner_codes_a_token_with_a_scale_and_an_integer_zero_point():
    """0 to 15 in 4 bits have the scale 1 and come back; with 0.4 between, numbers round."""
    peer = named("KVTuner KV4 per token")
    keys = (torch.arange(128) % 16).bfloat16().expand(1, 1, 2, 128).contiguous()
    keys[0, 0, 1, 5] = 5.375
    stored = peer.encode(keys, keys)
    numbers, scale, zero, _ = stored.payload[0]
    assert scale.flatten().tolist() == [1, 1] and zero.flatten().tolist() == [8, 8]
    assert numbers.dtype == torch.int8 and numbers[0, :16].tolist() == list(range(-8, 8))
    back, _ = peer.decode(stored.payload)
    assert back[0, 0, 1, 5] == 5
    back[0, 0, 1, 5] = 5.375
    assert torch.equal(back, keys)


def test_kvtuner_loses_its_zero_point_in_the_caches_type():
    """An offset of 100 deviations leaves 8 bits as coarse as bf16 keeps a number of that size."""
    peer = named("KVTuner KV8 per token")
    plain = random_pages(1)[0]
    offset = (plain.float() + 100).bfloat16()

    def error(keys):
        back = peer.roundtrip_pages(keys, keys).keys
        return float((back.float() - keys.float()).square().mean())

    assert error(offset) > 50 * error(plain)


def test_kvtuner_as_kivi_codes_keys_along_tokens_and_values_along_heads():
    peer = named("KVTuner KIVI g32 KV4")
    steps = (torch.arange(64) % 16).float()[:, None] + 100 * torch.arange(128)
    keys = (torch.arange(64) % 16).bfloat16()[:, None].expand(64, 128)[None, None].contiguous()
    back, _ = peer.decode(peer.encode(keys * 4, keys).payload)
    assert torch.equal(back, keys * 4)
    values = steps.T[:64, :64].bfloat16()[None, None].contiguous()
    assert not torch.equal(peer.decode(peer.encode(values, values).payload)[1], values)


def test_kvtuner_says_what_packing_would_save():
    assert named("KVTuner KV4 per token").packed_bits == 4.25
    assert named("KVTuner K8V4 per token").packed_bits == 6.25
    assert named("KVTuner KIVI g32 KV2").packed_bits == 3.0


def test_kivi_codes_channels_of_keys_and_tokens_of_values():
    """A channel with its own 16 levels comes back; the same numbers along a token do not."""
    peer = named("KIVI 4 bit g64")
    level = (torch.arange(64) % 16).float()[:, None]
    scale = 2.0 ** (torch.arange(128) % 4)
    keys = (level * scale + 3 * scale).bfloat16()[None, None].contiguous()
    back = peer.decode(peer.encode(keys, keys).payload)
    assert torch.equal(back[0].bfloat16(), keys)
    assert not torch.equal(back[1].bfloat16(), keys)


def test_kivi_rounds_to_the_nearest_level_and_keeps_a_group_of_equal_numbers():
    peer = named("KIVI 2 bit g32")
    values = torch.zeros(1, 1, 1, 128)
    values[..., :4] = torch.tensor([0.0, 3.0, 1.4, 1.6])
    values[..., 32:64] = 7
    back = peer.decode_tensor(
        peer.encode_tensor(values.bfloat16(), is_key=False).payload, is_key=False
    )
    assert back[0, 0, 0, :4].tolist() == [0, 3, 1, 2]
    assert back[0, 0, 0, 32:64].tolist() == [7] * 32


def test_centroids_are_lloyds_and_maxs():
    """J. Max, Quantizing for minimum distortion, 1960, table I."""
    assert turboquant.centroids(1).tolist() == pytest.approx([-0.7980, 0.7980], abs=2e-4)
    two = [-1.510, -0.4528, 0.4528, 1.510]
    assert turboquant.centroids(2).tolist() == pytest.approx(two, abs=5e-4)
    three = [0.2451, 0.7560, 1.344, 2.152]
    assert turboquant.centroids(3)[4:].tolist() == pytest.approx(three, abs=1e-3)


def test_rotations_keep_lengths():
    signed = turboquant.signed_hadamard(128, 3)
    for matrix in (turboquant.hadamard(128), turboquant.random_rotation(128), *signed[:, 0]):
        assert torch.allclose(matrix @ matrix.T, torch.eye(128), atol=1e-5)
    assert not torch.equal(signed[0], signed[1])


def test_turboquant_gives_keys_their_length_back_and_errs_as_its_quantizer_does():
    """The error of the best 16 levels of a normal number is 0.0095 of its square."""
    keys, values = random_pages(4)
    corrected = named("TurboQuant 4bit_nc").roundtrip_pages(keys, values).keys.float()
    lengths = corrected.norm(dim=-1) / keys.float().norm(dim=-1)
    assert torch.allclose(lengths, torch.ones_like(lengths), atol=5e-3)
    found = named("TurboQuant-mse 4 bit").roundtrip_pages(keys, values)
    for back, before in ((found.keys, keys), (found.values, values)):
        error = (back.float() - before.float()).square().mean() / before.float().square().mean()
        assert float(error) == pytest.approx(0.0095, rel=0.05)


def test_turboquant_values_are_uniform_between_their_smallest_and_largest():
    values = torch.zeros(1, 1, 1, 128)
    values[..., :4] = torch.tensor([0.0, 15.0, 3.4, 3.6])
    peer = named("TurboQuant 4bit_nc")
    back = peer.decode_tensor(peer.encode_tensor(values, is_key=False).payload, is_key=False)
    assert back[0, 0, 0, :4].tolist() == [0, 15, 3, 4]


def test_e2m1_rounds_halves_to_even_codes():
    numbers = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 0.26, 5.1, 9.0, -0.4])
    back = nvfp4.from_e2m1(nvfp4.to_e2m1(numbers)).tolist()
    assert back == [0, 1, 1, 2, 2, 4, 4, 0.5, 6, 6, -0.5]


def test_nvfp4_keeps_blocks_on_its_grid():
    """Blocks whose largest numbers are 6 and 3 times a power of two have exact scales."""
    block = torch.cat((nvfp4.GRID, -nvfp4.GRID))
    tensor = torch.stack((block, block / 2, 448 * block / 4, 0 * block)).reshape(1, 1, 1, 64)
    peer = named("NVFP4")
    back = peer.decode_tensor(peer.encode_tensor(tensor, is_key=True).payload, is_key=True)
    assert torch.allclose(back, tensor, rtol=1e-6)


def test_cachegen_counts_codes_tables_lengths_and_scales():
    """One symbol takes a byte for its stream, two equally frequent ones 64 bits and a little."""
    assert cachegen.code_bits(torch.full((3, 64), 7)) == 3 * 8
    assert cachegen.code_bits(torch.tensor([[0, 31] * 32])) == 72
    keys = torch.ones(1, 2, 64, 128).bfloat16()
    stored = named("CacheGen, page alone").encode(keys, keys)
    streams = 2 * 2 * 128
    assert stored.bits == streams * (8 + 33 * 16 + 32) + 2 * 64 * 32


def test_cachegen_keeps_levels_of_a_tokens_largest_number():
    """Fifteen levels of either sign in a small model; seven where a large one has 16 bins."""
    assert cachegen.bins_of(5, is_key=True).tolist() == [32] * 5
    assert cachegen.bins_of(28, is_key=True).tolist() == [32] * 10 + [16] * 18
    assert cachegen.bins_of(28, is_key=False).tolist() == [32] * 2 + [16] * 26
    keys = ((torch.arange(128) % 31) - 15).bfloat16().expand(1, 1, 64, 128).contiguous()
    peer = named("CacheGen, page alone")
    back, _ = peer.decode(peer.encode(keys, keys).payload)
    assert torch.equal(back, keys.float())


def test_cachegen_shares_tables_between_the_pages_of_a_chunk():
    alone, chunk = named("CacheGen, page alone"), named("CacheGen, 256 tokens")
    assert bits_per_value(chunk, 4) < bits_per_value(alone, 4) - 3


def test_zstd_is_exact():
    pytest.importorskip("zstandard")
    from peers.lossless import Zstd

    keys, values = random_pages()
    found = Zstd(3).roundtrip_pages(keys, values)
    assert torch.equal(found.keys, keys) and torch.equal(found.values, values)
    assert found.stored_bits < 16 * 2 * keys.numel()


def test_installed_peers_code_pages_and_lossless_ones_are_exact():
    """In a process of its own: transformers looks for their packages once, when it is imported."""
    if not PACKAGES.is_dir():
        pytest.skip("no .venv/peers: make peers installs the packages")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "peers", "--list", "--packages", str(PACKAGES)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tools"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "left out" not in run.stdout
    for name in ("quanto", "HQQ", "ggml q4_0", "nf4", "zipnn", "OpenZL"):
        assert name in run.stdout


# --- speed


def test_speed_is_measured_for_specs_and_for_peers():
    for found in (speed.of_spec("kv4", 0.0), speed.of_peer(named("fp8 e5m2, no scale"), 0.0)):
        assert found.rounds >= 3
        assert all(value > 0 for value in found.as_json().values())
        assert found.encode_p25 <= found.encode_ratio <= found.encode_p75


# --- statement, tables, document


def test_bits_at_equal_error_lie_between_measured_points():
    curve = [(4.0, 0.05), (2.0, 0.2), (3.0, 0.1)]
    assert statement.bits_at(curve, 0.1) == pytest.approx(3.0)
    assert statement.bits_at(curve, 0.1 * 2**0.5) == pytest.approx(2.5)
    assert statement.bits_at(curve, 0.3) is None and statement.bits_at(curve, 0.04) is None


def test_statement_says_whether_the_goal_is_reached_on_every_cache():
    def cache(error: float):
        rows = [("ecq-3", 3.0, 0.1), ("ecq-4", 4.0, 0.05), (statement.REFERENCE, 4.5, error)]
        return [
            {"codec": codec, "bits_per_value": bits, "output_error": out}
            for codec, bits, out in rows
        ]

    good = statement.statement({"a": cache(0.09), "b": cache(0.07)})
    assert good["is_reached"] and good["ecq_bits"]["a"] < good["ecq_bits"]["b"] < 3.7
    assert not statement.statement({"a": cache(0.09), "b": cache(0.051)})["is_reached"]
    assert not statement.statement({"a": cache(0.3)})["is_reached"]


def test_either_curve_of_ecq_reaches_the_goal_but_they_are_not_mixed():
    def cache(*points: tuple[str, float, float]):
        rows = [*points, (statement.REFERENCE, 4.5, 0.06)]
        return [
            {"codec": codec, "bits_per_value": bits, "output_error": out}
            for codec, bits, out in rows
        ]

    even = cache(("ecq-3", 3.0, 0.1), ("ecq-4", 4.0, 0.05))
    above = cache(("ecq-2.625/3", 2.8, 0.1), ("ecq-3.625/4", 3.8, 0.05))
    both = statement.statement({"a": even + above[:-1]})
    assert both["values_above_bits"]["a"] == pytest.approx(both["ecq_bits"]["a"] - 0.2)
    assert both["ecq_bits"]["a"] > 3.7 and both["is_reached"]
    assert not statement.statement({"a": even})["is_reached"]
    assert not statement.statement({"a": even, "b": above})["is_reached"]


def test_every_preset_has_a_row_and_aliases_have_none():
    named_specs = command.specs()
    texts = [CodecSpec.parse(text).text for text in named_specs.values()]
    assert len(texts) == len(set(texts))
    assert {CodecSpec.parse(name).text for name in PRESETS} <= set(texts)
    assert "balanced" not in named_specs and "ecq-3.5" in named_specs
    assert CodecSpec.parse(named_specs["ecq-3.375/3.75"]).value.bits == 60


def test_a_run_goes_on_where_it_broke_off_but_not_after_a_change(tmp_path: Path):
    options = argparse.Namespace(windows=2, seconds=1.0)
    digest = command.digest_of(options)
    parts = command.Parts(tmp_path, digest)
    assert parts.get("row", lambda: {"bits": 4}) == {"bits": 4}
    assert command.Parts(tmp_path, digest).get("row", lambda: None) == {"bits": 4}
    for other in ({"windows": 3, "seconds": 1.0}, {"windows": 2, "seconds": 2.0}):
        assert command.digest_of(argparse.Namespace(**other)) != digest
    parts.clear()
    assert parts.get("row", lambda: {"bits": 5}) == {"bits": 5}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_say_what_the_document_says(page: Path):
    """Tables are written by the tool alone, and every mark is one that it knows."""
    text = page.read_text(encoding="utf-8")
    assert "<!-- peers: " in text
    assert tables.written(text, json.loads(DOCUMENT.read_text())) == text


def test_unknown_mark_is_an_error():
    with pytest.raises(ValueError, match="'tabel'"):
        tables.written("<!-- peers: tabel -->\n<!-- end -->", {})


def test_reading_a_document_writes_pages_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("matplotlib", reason="make peers installs it")
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- peers: statement -->\nold\n<!-- end -->\nafter\n")
    words = ["--read", "--json", str(DOCUMENT), "--page", str(page), "--pictures", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["peers", *words])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command.main()
    text = page.read_text()
    assert "old" not in text and "attention-output error of KIVI" in text
    assert text.startswith("before\n") and text.endswith("after\n")
    for name in ("peers-error.svg", "peers-speed.svg"):
        assert (tmp_path / name).read_text().count("ecq-3") >= 1

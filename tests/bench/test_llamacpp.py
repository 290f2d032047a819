"""llama.cpp as a peer: files are found, made or refused by name; prompts go in and answers come out as token ids.

The binding is a double that answers over the loopback interface as llama.cpp's server does; one test runs the real one.
"""

import importlib.util
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orthrus import memory
from orthrus.bench.contenders import contenders, decoders
from orthrus.bench.lines import Result
from orthrus.bench.peers import ggufs, llamacpp
from orthrus.bench.race import Contender
from orthrus.bench.speed.report import read_report
from orthrus.bench.speed.run import Job, run
from orthrus.checkpoints.load import gguf_source
from orthrus.data.records import read_records
from orthrus.errors import ConfigError, DecodingError
from orthrus.model.fingerprint import backbone_tensors
from tests.bench.conftest import Ticks
from tests.families import tiny

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]
LLAMA = Contender("llama.cpp")


def write_gguf(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, form: str = "F32") -> Path:
    """Write a tiny Qwen3 as llama.cpp reads it; vectors stay in float32."""
    config = model.config
    writer = GGUFWriter(path, "qwen3")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    words = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {token["content"] for token in words["added_tokens"]}
    tokens = [str(tokenizer.convert_ids_to_tokens(i)) for i in range(config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in words["model"]["merges"]])
    writer.add_eos_token_id(int(tokenizer.eos_token_id))
    writer.add_add_bos_token(False)
    kind = GGMLQuantizationType[form]
    for name, tensor in backbone_tensors(model).items():
        values = tensor.detach().float().numpy()
        if values.ndim > 1:
            writer.add_tensor(gguf_name(name), quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    for ours, theirs in (
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers", "blk"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.", "attn_"),
        ("mlp.", "ffn_"),
        ("post_attention_layernorm", "ffn_norm"),
        ("input_layernorm", "attn_norm"),
        ("_proj", ""),
    ):
        name = name.replace(ours, theirs)
    return name


@pytest.fixture(scope="session")
def file(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", *loaded)


@pytest.fixture(scope="session")
def wide(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose matrices have rows of 64, which 8-bit blocks of 32 divide."""
    shape = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32, "num_hidden_layers": 1, "vocab_size": 300}
    return write_gguf(tmp_path_factory.mktemp("gguf") / "wide.gguf", tiny("qwen3", **shape), loaded[1])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(memory.FOLDER, str(tmp_path / "cache"))
    return tmp_path / "cache"


class Double:
    """The binding: servers that count up from the prompt's last token; `replies` are changed, `asked` looked at."""

    common_speculative_type = SimpleNamespace(
        COMMON_SPECULATIVE_TYPE_NONE="none", COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE="simple"
    )

    __version__ = "1"

    def get_system_info(self) -> str:
        return "CPU : AVX2 = 1 | "

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.params: list[Any] = []
        self.timings: dict[str, Any] = {}
        self.status = 200
        self.servers: list[ThreadingHTTPServer] = []

    def CommonParams(self) -> Any:
        parts = ("model", "cpuparams", "cpuparams_batch", "speculative")
        return SimpleNamespace(**{part: SimpleNamespace() for part in parts})

    def Server(self, params: Any) -> Any:
        if params.model.path.endswith("bad.gguf"):
            raise RuntimeError("Failed to init server")
        double = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                double.asked.append(request)
                prompt, limit = request["prompt"], request["n_predict"]
                timings = {"prompt_n": len(prompt), "prompt_ms": 250.0, **double.timings}
                reply = {"tokens": [prompt[-1] + i + 1 for i in range(limit)], "timings": timings}
                body = json.dumps(reply if double.status == 200 else {"error": "too long"}).encode()
                self.send_response(double.status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Stay silent."""

        self.params.append(params)
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.servers.append(server)
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return SimpleNamespace(listening_address=f"http://127.0.0.1:{server.server_port}")


class InThread(Thread):
    """A process that is a thread, since a double of the binding is in this process alone."""

    def __init__(self, *, target: Any, args: tuple[Any, ...], daemon: bool) -> None:
        connection, *more = args
        super().__init__(target=target, args=(Connection(os.dup(connection.fileno())), *more), daemon=daemon)


@pytest.fixture
def binding(monkeypatch: pytest.MonkeyPatch) -> Iterator[Double]:
    double = Double()
    threads = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=InThread)
    monkeypatch.setattr(llamacpp, "multiprocessing", SimpleNamespace(get_context=lambda _: threads))
    monkeypatch.setitem(sys.modules, "xllamacpp", double)  # type: ignore[arg-type]
    monkeypatch.setattr(llamacpp, "check", lambda: None)
    yield double
    for server in double.servers:
        server.shutdown()
        server.server_close()


def test_prompts_go_in_as_token_ids_greedily_and_nothing_is_remembered(
    loaded: Loaded, file: Path, binding: Double
) -> None:
    decode = decoders(*loaded, [LLAMA], weights=ggufs.weights([], file), context=100)[LLAMA]
    answer = decode([[60, 61, 62]], 4)[0]
    assert answer.token_ids == [63, 64, 65, 66]
    assert answer.stats["first_token_seconds"] == 0.25
    assert answer.stats["forwards"] == answer.stats["emitted"] == 4
    request = binding.asked[0]
    assert (request["prompt"], request["n_predict"]) == ([60, 61, 62], 4)
    assert (request["temperature"], request["cache_prompt"]) == (0, False)
    given = binding.params[0]
    assert given.n_ctx == 256
    assert given.speculative.types == ["none"]


def test_both_thread_counts_are_torchs(
    loaded: Loaded, file: Path, binding: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    decoders(*loaded, [LLAMA], weights=ggufs.weights([], file))
    assert (binding.params[0].cpuparams.n_threads, binding.params[0].cpuparams_batch.n_threads) == (3, 3)


def test_lookup_drafts_save_passes(loaded: Loaded, file: Path, binding: Double) -> None:
    who = Contender("llama.cpp-lookup")
    decode = decoders(*loaded, [who], weights=ggufs.weights([], file), context=100)[who]
    binding.timings = {"draft_n": 5, "draft_n_accepted": 3}
    stats = decode([[60]], 8)[0].stats
    assert (stats["emitted"], stats["forwards"], stats["drafted"], stats["accepted"]) == (8, 5, 5, 3)
    assert binding.params[0].speculative.types == ["simple"]


def test_answers_end_where_the_models_own_do(
    loaded: Loaded, file: Path, binding: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded[0].generation_config, "eos_token_id", 62)
    decode = decoders(*loaded, [LLAMA], weights=ggufs.weights([], file), context=100)[LLAMA]
    assert decode([[60]], 9)[0].token_ids == [61, 62]


def test_a_prompt_that_llamacpp_reads_otherwise_or_refuses_is_an_error(file: Path, binding: Double) -> None:
    server = llamacpp.Server(ggufs.weights([], file)[None], threads=1, context=8)
    binding.timings = {"prompt_n": 4}
    with pytest.raises(DecodingError, match="own 3 tokens, found that it read 4"):
        server.answer([1, 2, 3], 2)
    binding.status = 400
    with pytest.raises(DecodingError, match="too long"):
        server.answer([1, 2, 3], 2)


def test_a_file_that_llamacpp_cannot_load_is_named(file: Path, binding: Double, tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(file.read_bytes())
    with pytest.raises(ConfigError, match=r"bad\.gguf"):
        llamacpp.Server(ggufs.weights([str(bad)], None)["bad"], threads=1, context=8)


def test_forms_are_made_once_from_the_same_values(wide: Path, cache: Path) -> None:
    made = ggufs.weights(["q8_0", "bf16"], wide)
    assert {name: found.quantisation for name, found in made.items()} == {"q8_0": "Q8_0", "bf16": "BF16"}
    assert {found.file.parent for found in made.values()} == {cache}
    before, after = GGUFReader(wide), GGUFReader(made["q8_0"].file)
    assert set(before.fields) <= set(after.fields)
    assert before.get_field("tokenizer.ggml.tokens").contents() == after.get_field("tokenizer.ggml.tokens").contents()
    for old, new in zip(before.tensors, after.tensors, strict=True):
        expected = quants.quantize(old.data, GGMLQuantizationType.Q8_0) if old.data.ndim > 1 else old.data
        assert np.array_equal(new.data, expected)
    stamp = made["q8_0"].file.stat().st_mtime_ns
    again = ggufs.weights(["Q8_0"], wide)["q8_0"]
    assert again == made["q8_0"]
    assert again.file.stat().st_mtime_ns == stamp


def test_the_form_that_the_backbones_own_file_has_is_that_file(file: Path, cache: Path) -> None:
    assert ggufs.weights(["f32"], file)["f32"] == ggufs.weights([], file)[None]
    assert not cache.exists()


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("asked", "has_source", "named"),
    [
        ([], False, "--gguf"),
        (["q8_0"], False, "--gguf"),
        (["q7"], True, "q7"),
        (["q8_0"], True, "no form Q8_0"),
        (["f32", "F32"], True, "twice"),
        (["nowhere.gguf"], True, "nowhere.gguf"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(asked: list[str], has_source: bool, named: str, file: Path) -> None:
    with pytest.raises(ValueError, match=named):
        ggufs.weights(asked, file if has_source else None)


def test_what_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"no such thing, but long enough to have a head")
    with pytest.raises(ConfigError, match=r"other\.gguf must be a GGUF file"):
        ggufs.weights([str(other)], None)


def test_weights_of_another_shape_and_other_modes_are_refused(
    loaded: Loaded, file: Path, binding: Double, tmp_path: Path
) -> None:
    found = ggufs.weights([], file)[None]
    loaded[0].config.num_hidden_layers += 1
    try:
        with pytest.raises(ConfigError, match="2 layers"):
            run(
                Job(model="tiny", suites=("synthetic:maths",), contenders=(LLAMA,), gguf_source=found.file),
                tmp_path / "out.jsonl",
                load=lambda _: loaded,
            )
    finally:
        loaded[0].config.num_hidden_layers -= 1
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(ConfigError, match="--gguf is of the modes"):
        contenders(["ar"], ggufs=["q8_0"])


def test_a_missing_package_is_named_before_anything_else_is_done(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    job = Job(model="tiny", suites=("none",), contenders=(LLAMA,), gguf_source=file)
    with pytest.raises(ConfigError, match=r"xllamacpp.*pip install"):
        run(job, tmp_path / "out.jsonl", load=lambda _: pytest.fail("loaded"))


def test_the_source_of_a_backbone_is_its_gguf_file(file: Path, model_folder: Path) -> None:
    assert gguf_source(model_folder, file) == file
    assert gguf_source(file) == file
    assert gguf_source(model_folder) is None
    assert gguf_source("nano") is None


def test_a_run_says_which_weights_answered_and_reports_tell_them_apart(
    loaded: Loaded, file: Path, binding: Double, cache: Path, prompt_file: Path, ticks: Ticks, tmp_path: Path
) -> None:
    asked = ("bf16", str(file))
    job = Job(
        model="tiny",
        suites=(str(prompt_file),),
        contenders=contenders(["ar", "llama.cpp"], ggufs=asked),
        max_new_tokens=3,
        rounds=1,
        limit=2,
        gguf=asked,
        gguf_source=file,
    )
    output = tmp_path / "out.jsonl"
    run(job, output, load=lambda _: loaded, clock=ticks)
    lines = Result.read(read_records(output), where="out")
    found = {line.plan: line.stats for line in lines if line.mode == "llama.cpp"}
    assert {plan: stats["quantisation"] for plan, stats in found.items()} == {"bf16": "BF16", "tiny": "F32"}
    assert found["tiny"]["gguf"] == "tiny.gguf"
    assert len({stats["sha256"] for stats in found.values()}) == 2
    assert {line.identical for line in lines if line.mode == "llama.cpp"} == {False}
    settings = read_records(output)[0]["settings"]
    assert settings["llama.cpp"] == {"xllamacpp": "1", "build": "CPU : AVX2 = 1"}
    assert settings["gguf"]["bf16"]["sha256"] == found["bf16"]["sha256"]
    report = read_report([output], baselines=["llama.cpp:bf16"])
    assert "llama.cpp tiny" in {summary.contender.label for summary in report.summaries}
    assert all("llama.cpp:bf16" in s.against for s in report.summaries if s.contender.plan != "bf16")


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed (extra peers)")
def test_llamacpp_itself_writes_plain_decodings_text_from_float32_weights(loaded: Loaded, file: Path) -> None:
    """No promise of llama.cpp's, but with weights without ties it holds, and a wrong prompt or tensor would show."""
    prompts = [[60, 61, 62, 60, 61, 62], [80, 81, 82], [90]]
    everyone = [Contender("ar", None, "distribution"), LLAMA, Contender("llama.cpp-lookup")]
    run = decoders(*loaded, everyone, weights=ggufs.weights([], file), context=64)
    for prompt in prompts:
        plain, *others = (run[who]([prompt], 10)[0].token_ids for who in everyone)
        assert others == [plain, plain]

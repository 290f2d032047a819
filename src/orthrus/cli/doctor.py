"""`orthrus doctor`: report what this machine has and what works on it, and check that decoding is lossless here."""

import os
import platform
from collections.abc import Iterable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import typer

from orthrus import __version__
from orthrus.cli import common, measuring, selfcheck
from orthrus.cli.common import err, print_json, say
from orthrus.cli.selfcheck import Check
from orthrus.errors import OrthrusError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROMPTS = 8
_TOKENS = 96
_CONTEXT = 256
_REPEATS = 5
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


def doctor(json: common.Json = False) -> None:
    """Report versions, devices and precisions, and check on this machine that decoding is lossless."""
    import torch

    measuring.prepare()
    installed, devices = {name: version(name) for name in _PACKAGES}, _devices()
    facts: dict[str, Any] = {
        "versions": {"orthrus": __version__, "python": platform.python_version(), **installed},
        "devices": devices,
        "threads": torch.get_num_threads(),
        "dtypes": {device: _dtypes(device) for device in devices},
        "multiplies": _multiplies(),
        "memory": _memory(),
        "bundled": _bundled(),
    }
    checks = _checks(facts["bundled"], devices)
    passed = bool(checks) and all(check.passed for check in checks) and "error" not in facts["bundled"]
    facts |= {
        "checks": [check.to_dict() for check in checks],
        "costs": facts["bundled"].pop("costs", []),
        "fastest": _fastest(facts["bundled"].get("seconds", {}), facts["bundled"].get("device", "")),
        "passed": passed,
        "verdict": _verdict(checks, passed),
    }
    if json:
        print_json(facts)
    else:
        _show(facts)
    if not passed:
        raise typer.Exit(1)


def _memory() -> dict[str, Any]:
    """Tell where files are kept for processes to come, and how many."""
    from orthrus.memory import folder

    home = folder()
    kept = 0 if home is None else sum(1 for _ in home.glob("*/*.json"))
    return {"folder": None if home is None else str(home), "files": kept}


def _devices() -> dict[str, str]:
    import torch

    from orthrus.provenance import device_name

    described = {"cpu": f"{device_name(torch.device('cpu'))}, {os.cpu_count()} logical cores"}
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        described[f"cuda:{index}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        described["mps"] = "Apple GPU"
    return described


def _dtypes(device: str) -> dict[str, bool]:
    """Tell which precisions this device can multiply and attend in."""
    import torch

    from orthrus.checkpoints.integers import INTEGERS, computes
    from orthrus.checkpoints.load import DTYPES

    works = {}
    for name, dtype in DTYPES.items():
        try:
            x = torch.ones(1, 1, 4, 8, device=device, dtype=dtype)
            values = x @ torch.eye(8, device=device, dtype=dtype)
            works[name] = bool((torch.nn.functional.scaled_dot_product_attention(x, x, values) == 1).all())
        except RuntimeError:
            works[name] = False
    if device == "cpu":
        works |= {name: computes(name) for name in INTEGERS}
    return works


def _multiplies() -> dict[str, str]:
    """Tell how linear layers are multiplied on the CPU, by precision."""
    from orthrus.checkpoints.load import DTYPES
    from orthrus.kernels import compiled, fbgemm, int8, native

    wide = "in float32, weights read in float16" if fbgemm.can_half() else "in float32, one row by itself"
    how = {name: "by oneDNN" if native.multiplies(dtype) else wide for name, dtype in DTYPES.items()}
    inputs = "inputs in 8 bits" if int8.rounds_inputs() else "inputs in two parts of 7 bits"
    own = ", by an operator compiled here" if int8.is_exact() and int8.own_operator() is not None else ""
    failed = "" if (log := compiled.failure()) is None else f" (the compiler of operators failed: {log})"
    how["int8"] = f"as integers, {inputs}{own}{failed}" if int8.is_exact() else "not here"
    in_blocks = "as integers in blocks of 32, by an operator compiled here"
    return how | {"int4": in_blocks if compiled.compiles() else "not here"}


def _fastest(seconds: dict[str, float], device: str) -> dict[str, Any]:
    """Name the precision whose plain step and widest verification take the least time, and what others take of it."""
    if len(seconds) < 2:
        return {}
    best = min(seconds, key=lambda dtype: seconds[dtype])
    others = {dtype: taken / seconds[best] for dtype, taken in seconds.items() if dtype != best}
    return {"device": device, "dtype": best, "others": others}


def _bundled() -> dict[str, Any]:
    """Describe the bundled model by its files: present or not, and how large."""
    from orthrus.checkpoints import files
    from orthrus.zoo import BUNDLED

    name = common.settled(common.DEFAULT)
    home = BUNDLED.get(name)
    if home is None or not (home / files.CONFIG_FILE).exists():
        return {"name": name, "present": False}
    size = sum(file.stat().st_size for file in home.iterdir() if file.is_file())
    return {"name": name, "present": True, "megabytes": size / 1e6}


def _checks(bundled: dict[str, Any], devices: Iterable[str]) -> list[Check]:
    """Run the lossless checks; what the bundled model turns out to be is added to its description."""
    from orthrus.checkpoints.integers import INTEGERS, computes

    with err().status("checking that decoding is lossless here …"):
        checks = [selfcheck.check_random(device) for device in devices if device != "mps"]
    if not bundled["present"]:
        return checks
    try:
        for dtype in ("float32", "bfloat16"):
            checks.append(_check_bundled(bundled, dtype))
    except OrthrusError as error:
        bundled["error"] = str(error)
        return checks
    for dtype in INTEGERS:
        if bundled["device"] == "cpu" and computes(dtype):
            try:
                checks.append(_check_bundled(bundled, dtype))
            except OrthrusError as error:  # its operators could not be compiled: the model is sound
                err().print(f"{dtype} is not used here: {error}", style="yellow", markup=False)
    return checks


def _check_bundled(bundled: dict[str, Any], dtype: str) -> Check:
    from orthrus.decode.footprint import footprint
    from orthrus.model.attach import config_of
    from orthrus.model.fingerprint import twin_tensors

    model, tokenizer = common.load(bundled["name"], dtype=dtype)
    twin = sum(tensor.numel() for tensor in twin_tensors(model).values())
    bundled |= {
        "device": str(model.device),
        "backbone_parameters": sum(p.numel() for p in model.parameters()) - twin,
        "view_parameters": twin,
        "block_size": config_of(model).block_size,
    }
    bytes_of = footprint(model, terms=config_of(model).proposals + 1)
    bundled.setdefault("cache", {})[dtype] = {"position_bytes": bytes_of.position, "state_bytes": bytes_of.states}
    if dtype == str(model.dtype).removeprefix("torch."):
        bundled.setdefault("products", {})[dtype] = _products(model)
    share = 1 if bundled["name"] == "nano" else 4  # a model of a real size takes its time
    prompts, tokens = _PROMPTS // share, _TOKENS // share
    with err().status(f"checking {bundled['name']} in {dtype} …"):
        check = selfcheck.check_loaded(bundled["name"], model, tokenizer, prompts=prompts, max_new_tokens=tokens)
        costs = _costs(bundled["name"], model, dtype)
        bundled.setdefault("costs", []).extend(costs)
        bundled.setdefault("seconds", {})[dtype] = sum(cost["seconds"] for cost in (costs[0], costs[-1]))
    return check


def _products(model: "PreTrainedModel") -> dict[str, str]:
    """Tell what one row and several are multiplied by: the weights, or copies of them for this CPU's kernels."""
    from orthrus.kernels.packed import AsIs, kernels_of

    kernels = max(kernels_of(model), default=AsIs(one=True, several=True))
    one = "weights, by an operator compiled here" if kernels.own else "weights" if kernels.one else "copies"
    return {"one": one, "several": "weights" if kernels.several else "copies"}


def _costs(name: str, model: "PreTrainedModel", dtype: str) -> list[dict[str, Any]]:
    """Time what a plan weighs: a plain step, drafts and verifications of a half and a whole block."""
    from orthrus.bench.speed.passes import costs
    from orthrus.model.attach import config_of

    block = config_of(model).proposals + 1
    context = min(_CONTEXT, model.config.get_text_config().max_position_embeddings - block)
    measured = costs(model, widths=(1, max(2, block // 2), block), contexts=(context,), repeats=_REPEATS)
    labels = {"model": name, "dtype": dtype, "device": str(model.device)}
    return [{**labels, **{k: v for k, v in cost.to_dict().items() if k != "repeats_seconds"}} for cost in measured]


def _verdict(checks: list[Check], passed: bool) -> str:
    broken = [f"{check.model} in {check.dtype} on {check.device}" for check in checks if not check.passed]
    if broken:
        return f"decoding is NOT lossless here: {', '.join(broken)} differed from plain decoding"
    if not passed:
        return "the bundled model cannot be used: install the package again"
    return "decoding is lossless here: every float32 text equals plain decoding's"


def _show(facts: dict[str, Any]) -> None:
    lines: dict[str, str] = dict(facts["versions"])
    for device, what in facts["devices"].items():
        works = (name if works else f"no {name}" for name, works in facts["dtypes"][device].items())
        lines[device] = f"{what}: {', '.join(works)}"
    memory = facts["memory"]
    kept = "nothing is kept" if memory["folder"] is None else f"{memory['files']} files in {memory['folder']}"
    lines |= {"threads": str(facts["threads"]), "memory": kept, facts["bundled"]["name"]: _describe(facts["bundled"])}
    for name, value in lines.items():
        say(f"{name:<14}{value}")
    for check in facts["checks"]:
        same = f"{check['identical']} of {check['texts']} texts identical"
        cycles = f"{check['tokens_per_cycle']:.1f} tokens per cycle"
        remark = "" if check["required"] else " (identity is not promised at this precision)"
        say(f"{'check':<14}{check['model']}, {check['dtype']}, {check['device']}: {same}, {cycles}{remark}")
    for run in dict.fromkeys((cost["model"], cost["dtype"], cost["device"]) for cost in facts["costs"]):
        costs = [cost for cost in facts["costs"] if (cost["model"], cost["dtype"], cost["device"]) == run]
        timed = (f"{cost['pass']} {cost['width']} {1000 * cost['seconds']:.1f} ms" for cost in costs)
        say(f"{'passes':<14}{', '.join(run)}: {', '.join(timed)}")
    for dtype, size in facts["bundled"].get("cache", {}).items():
        thousand = (size["state_bytes"] + 1000 * size["position_bytes"]) / 1e6
        say(f"{'cache':<14}{dtype}: {thousand:.1f} MB for a text of 1,000 tokens")
    for dtype, products in facts["bundled"].get("products", {}).items():
        say(f"{'products':<14}{dtype}: one row by {products['one']}, several by {products['several']}")
    for dtype, how in facts["multiplies"].items():
        say(f"{'multiplies':<14}{dtype}: {how}")
    if fastest := facts["fastest"]:
        others = ", ".join(f"{dtype} takes {ratio:.1f} times as long" for dtype, ratio in fastest["others"].items())
        where = f"--dtype {fastest['dtype']} on {fastest['device']}"
        rounded = "; its texts are its own, since it rounds weights" if fastest["dtype"].startswith("int") else ""
        say(f"{'fastest':<14}{where}: {others} for a plain step and a verification{rounded}")
    say(facts["verdict"], style="bold green" if facts["passed"] else "bold red")


def _describe(bundled: dict[str, Any]) -> str:
    if not bundled["present"]:
        return "not in this installation"
    if "error" in bundled:
        return f"cannot be used: {bundled['error']}"
    return (
        f"{bundled['backbone_parameters'] / 1e6:.1f}M parameters, a view of {bundled['view_parameters'] / 1e6:.1f}M, "
        f"blocks of {bundled['block_size']}, {bundled['megabytes']:.1f} MB"
    )

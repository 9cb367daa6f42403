"""A program of the user's as a runtime: what it is given, and what is not believed."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latency_helpers import FAKE_DEVICE, assert_close, expected
from networks import example, tiny
from torch import nn

from wgates_plugin.errors import (
    ConfigError,
    ExportError,
    MeasurementError,
    RuntimeUnavailableError,
)
from wgates_plugin.latency import CommandRuntime, RuntimeSettings, get_runtime, measure, timing

PYTHON = [sys.executable, "-S", "-c"]


def runtime(*command: str, settings: RuntimeSettings | None = None, **options: Any) -> Any:
    options = {"device_name": "a board", "artefact": "pt2", "retries": 0, **options}
    return get_runtime("command", settings, command=list(command), **options)


def saying(code: str, **options: Any) -> Any:
    """A runtime whose program is a line of Python that sees the model's path in sys.argv."""
    return runtime(*PYTHON, f"import sys, time\n{code}", "{model}", **options)


def failure(code: str, **options: Any) -> str:
    with (
        saying(code, **options).load(nn.ReLU(), example()) as session,
        pytest.raises(MeasurementError) as caught,
    ):
        measure(session, seconds=0, min_rounds=1, warmup=1)
    return str(caught.value)


def logged(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_program_gets_what_it_asks_for(tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = ["model={model}", "inputs={inputs}", "as={threads},{precision},{device}", "{other}"]
    settings = RuntimeSettings(threads=8, device="gpu", precision="int8")
    made = runtime(*FAKE_DEVICE, *words, f"log={log}", "ms=1", settings=settings, rounds=7)
    with made.load(nn.ReLU(), {"input": example()}) as session:
        assert session.elapsed_ms() == 1.0
        (told,) = logged(log)
        assert told["as"] == "8,int8,gpu"
        assert "{other}" in told
        assert Path(told["model"]).suffix == ".pt2"
        with np.load(told["inputs"], allow_pickle=False) as arrays:
            assert np.array_equal(arrays["input"], example().numpy())
        for _ in range(6):
            session.elapsed_ms()
        assert len(logged(log)) == 1
        session.elapsed_ms()
        assert len(logged(log)) == 2
    assert not Path(told["model"]).exists()


def test_identity_names_the_device_and_the_command() -> None:
    first = runtime(*FAKE_DEVICE, "{model}").identity(example())
    other = runtime(*FAKE_DEVICE, "{model}", device_name="a phone").identity(example())
    assert other == {**first, "device_name": "a phone"}
    assert first["device_name"] == "a board"
    assert first["options"]["command"][-1] == "{model}"
    assert first["library"] is None  # only the program knows


def test_without_a_placeholder_candidate_and_reference_run_in_turn(tmp_path: Path) -> None:
    log = tmp_path / "log"
    made = runtime(*FAKE_DEVICE, "model={model}", f"log={log}", "ms=3", rounds=2)
    with made.load(nn.ReLU(), example()) as mine, made.load(nn.ReLU(), example()) as other:
        found = measure(mine, reference=other, seconds=0, min_rounds=2, warmup=1)
    assert found.samples_ms == found.reference_samples_ms == (3.0, 3.0)
    models = [told["model"] for told in logged(log)]
    assert len(set(models)) == 2
    assert models[:2] == [str(mine.path), str(other.path)]


def test_times_of_an_earlier_measurement_are_not_used_again(tmp_path: Path) -> None:
    """The device slows down between two measurements; what the reference had left is stale."""
    speed = tmp_path / "ms"
    code = f"print('{{\"samples_ms\": [%s, %s, %s, %s]}}' % ((open({str(speed)!r}).read(),) * 4))"
    made = saying(code, rounds=4)
    with made.load(nn.ReLU(), example()) as mine, made.load(nn.Tanh(), example()) as reference:
        for ms in ("0.1", "0.2"):
            speed.write_text(ms)
            found = measure(
                mine, reference=reference, reference_ms=0.1, seconds=0, min_rounds=1, warmup=1
            )
            assert (found.latency_ms, found.drift) == (0.1, float(ms) / 0.1)
            assert found.reference_samples_ms == (float(ms),)


def test_with_the_placeholder_one_run_gives_pairs(tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = ["model={model}", "reference={reference}", "ms=2", "reference_ms=4", f"log={log}"]
    made = runtime(*FAKE_DEVICE, *words, rounds=3)
    with made.load(nn.ReLU(), example()) as mine, made.load(nn.ReLU(), example()) as other:
        calibrated = measure(other, seconds=0, min_rounds=1, warmup=1)
        alone = len(logged(log))
        found = measure(mine, reference=other, seconds=0, min_rounds=2, warmup=1)
        assert calibrated.latency_ms == 2.0
        assert found.ratio == 0.5
        pairs = logged(log)[alone:]
        assert {(told["model"], told["reference"]) for told in pairs} == {
            (str(mine.path), str(other.path))
        }
        # 1 warm-up inference and 2 blocks of 4 (15 ms / 4 ms), in runs of 3 pairs.
        assert found.reference_samples_ms == (4.0, 4.0)
        before = len(logged(log))
        assert other.elapsed_ms() == 2.0
        assert logged(log)[before]["model"] == str(other.path)


def test_pairs_stay_pairs_after_unequal_warm_ups(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device slows down from inference to inference, the reference always takes ten times."""
    code = (
        "import sys, time\n"
        "times = [0.1 * (1 + i) for i in range(int(sys.argv[1]))]\n"
        "time.sleep(11 * sum(times) / 1e3)\n"
        'print(\'{"samples_ms": %s, "reference_samples_ms": %s}\' % '
        "(times, [10 * t for t in times]))"
    )
    made = runtime(*PYTHON, code, "{rounds}", "{model}", "{reference}", rounds=12)
    monkeypatch.setattr(timing, "_WARMUP_SECONDS", 0.003)  # five of the one, two of the other
    monkeypatch.setattr(timing, "_block_length", lambda _: 1)
    with made.load(nn.ReLU(), example()) as mine, made.load(nn.ReLU(), example()) as other:
        found = measure(mine, reference=other, seconds=0, min_rounds=20)
    assert found.warmup == 5
    pairs = zip(found.samples_ms, found.reference_samples_ms, strict=True)
    assert all(slow == pytest.approx(10 * fast) for fast, slow in pairs)
    assert found.samples_ms[0] == pytest.approx(0.1)


def test_what_the_machine_does_to_this_process_does_not_count() -> None:
    made = runtime(*FAKE_DEVICE, "{model}", "ms=3", rounds=4)
    switches = iter(range(10**6))
    with made.load(nn.ReLU(), example()) as session:
        found = measure(session, seconds=0, min_rounds=2, switches=lambda: next(switches))
    assert found.samples_ms == (3.0, 3.0)
    assert found.disturbed == 0


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("sys.exit('no device\\nattached')", "exit status 1.*no device\nattached"),
        ("pass", "no JSON object.*nothing at all.*samples_ms"),
        ("print('ready')", "no JSON object.*last line: ready"),
        ("print('[1]')", "no JSON object"),
        ("print('{}')", "no `samples_ms`.*nothing"),
        ("print('{\"time\": [1]}')", "it has: time"),
        ("print('{\"samples_ms\": 3}')", "print a list"),
        ("print('{\"samples_ms\": []}')", "print a list"),
        ("print('{\"samples_ms\": [0]}')", "holds 0;"),
        ("print('{\"samples_ms\": [1, -2.5]}')", "holds -2.5"),
        ("print('{\"samples_ms\": [NaN]}')", "holds nan"),
        ("print('{\"samples_ms\": [Infinity]}')", "holds inf"),
        ("print('{\"samples_ms\": [true]}')", "holds True"),
        ('print(\'{"samples_ms": ["1"]}\')', "holds '1'"),
        ("print('{\"samples_ms\": [' + '9' * 401 + ']}')", "holds 999.*finite positive"),
        ("print('{\"samples_ms\": [-' + '9' * 401 + ']}')", "holds -999.*finite positive"),
        ("print('{\"samples_ms\": [' + '9' * 9999 + ']}')", "no JSON object"),
        ("print('{\"samples_ms\": [1e-300]}')", "holds 1e-300, less than a nanosecond"),
        ("print('{\"samples_ms\": [0.5, 1e-7]}')", "holds 1e-07, less than a nanosecond"),
        ("print('[' * 100000)", "no JSON object"),
        ("print('{\"samples_ms\": ' + '[' * 900 + ']' * 900 + '}')", "milliseconds"),
        ("print('{\"latency_ms\": [9e5, 9e5]}')", r"1.8e\+06 ms together.*ran for"),
    ],
)
def test_what_is_not_believed(code: str, words: str) -> None:
    import re

    message = failure(code)
    assert re.search(words, message, re.DOTALL), message
    assert message.startswith("command `")
    assert "tried once" in message


@pytest.mark.parametrize("printed", [1, 49, 51])
def test_as_many_times_as_rounds_are_printed(printed: int) -> None:
    code = f"print('{{\"samples_ms\": [' + ', '.join(['0.01'] * {printed}) + ']}}')"
    made = runtime(*PYTHON, code, "{model}", "{rounds}", rounds=50)
    with (
        made.load(nn.ReLU(), example()) as session,
        pytest.raises(MeasurementError, match=f"{printed} times where 50 rounds were asked for"),
    ):
        session.elapsed_ms()


def test_unpaired_samples_are_refused() -> None:
    code = 'print(\'{"samples_ms": [0.1, 0.1], "reference_samples_ms": [0.1]}\')'
    made = runtime(*PYTHON, code, "{model}", "{reference}")
    with (
        made.load(nn.ReLU(), example()) as session,
        pytest.raises(MeasurementError, match="2 samples_ms and 1 reference_samples_ms"),
    ):
        session.elapsed_ms()


def test_latency_ms_serves_too() -> None:
    with saying("print('{\"latency_ms\": [0.25]}')").load(nn.ReLU(), example()) as session:
        assert session.elapsed_ms() == 0.25


def test_a_hanging_program_is_killed_with_its_children(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = (
        "import subprocess\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        f"open({str(pid)!r}, 'w').write(str(child.pid))\n"
        "child.wait()"
    )
    assert "did not end within 3 s" in failure(code, timeout_s=3.0)
    child = int(pid.read_text())
    for _ in range(100):  # what is killed may wait for its funeral
        if not _alive(child):
            break
        time.sleep(0.05)
    assert not _alive(child)


DAEMON = (
    "import subprocess\n"
    "daemon = subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
    "open({pid!r}, 'w').write(str(daemon.pid))\n"
)


@pytest.mark.parametrize("hangs", [False, True])
def test_a_daemon_is_not_waited_for(tmp_path: Path, hangs: bool) -> None:
    """As the first call of adb leaves its server behind, which inherits the output."""
    pid = tmp_path / "pid"
    code = DAEMON.format(pid=str(pid))
    if hangs:
        assert "did not end within 3 s" in failure(f"{code}time.sleep(60)", timeout_s=3.0)
    else:
        made = saying(f"{code}print('{{\"samples_ms\": [0.5]}}')", timeout_s=50.0)
        with made.load(nn.ReLU(), example()) as session:
            assert session.elapsed_ms() == 0.5
    daemon = int(pid.read_text())
    assert _alive(daemon)  # else nothing was tested
    os.kill(daemon, signal.SIGKILL)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not (state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z")


def test_failures_are_tried_again(tmp_path: Path) -> None:
    count = tmp_path / "count"
    code = (
        f"file = open({str(count)!r}, 'a+'); file.write('x'); file.seek(0)\n"
        "sys.exit('unplugged') if len(file.read()) < {n} else print('{{\"samples_ms\": [0.5]}}')"
    )
    with saying(code.format(n=3), retries=2).load(nn.ReLU(), example()) as session:
        assert session.elapsed_ms() == 0.5
    count.unlink()
    message = failure(code.format(n=9), retries=2)
    assert "tried 3 times" in message
    assert "unplugged" in message
    assert len(count.read_text()) == 3


def test_outputs_are_the_programs_where_it_writes_them() -> None:
    code = "import numpy\nnumpy.savez(sys.argv[2], numpy.full((2, 3), 7.0), numpy.zeros(1))"
    code += "\nprint('{\"samples_ms\": [0.01]}')"
    made = runtime(sys.executable, "-c", f"import sys\n{code}", "{model}", "{outputs}")
    with made.load(nn.ReLU(), example()) as session:
        assert_close(session.outputs(), [torch.full((2, 3), 7.0), torch.zeros(1)])
    silent = runtime(*FAKE_DEVICE, "{model}", "outputs={outputs}")
    with (
        silent.load(nn.ReLU(), example()) as session,
        pytest.raises(ExportError, match="outputs are not readable"),
    ):
        session.outputs()


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"PK\x03\x04 no more than the beginning of a zip",
        b"no zip at all",
        "lone array",
        "no arrays",
        "cut off",
        "bit flipped",
        "texts",
    ],
)
def test_outputs_that_cannot_be_read_are_named(tmp_path: Path, damage: bytes | str) -> None:
    wrong = tmp_path / "wrong"
    if isinstance(damage, bytes):
        wrong.write_bytes(damage)
    else:
        with wrong.open("wb") as file:
            if damage == "lone array":
                np.save(file, np.ones(3))
            elif damage == "no arrays":
                np.savez(file)
            elif damage == "texts":
                np.savez(file, np.array(["one", "two"]))
            else:
                np.savez(file, np.ones(300))
        content = wrong.read_bytes()
        if damage == "cut off":
            wrong.write_bytes(content[: len(content) // 2])
        elif damage == "bit flipped":
            wrong.write_bytes(content[:700] + bytes([content[700] ^ 1]) + content[701:])
    code = f"import shutil\nshutil.copy({str(wrong)!r}, sys.argv[2])"
    code += "\nprint('{\"samples_ms\": [0.01]}')"
    made = runtime(*PYTHON, f"import sys\n{code}", "{model}", "{outputs}")
    with (
        made.load(nn.ReLU(), example()) as session,
        pytest.raises(ExportError, match=r"outputs are not readable.*as an \.npz of plain"),
    ):
        session.outputs()


@pytest.mark.parametrize("artefact", ["onnx", "pt2", "pte"])
def test_every_artefact_is_compared_before_it_is_sent(artefact: str, tmp_path: Path) -> None:
    if artefact == "pte":
        pytest.importorskip("executorch.exir")
    network = tiny("plain").train()
    made = runtime(*FAKE_DEVICE, "{model}", artefact=artefact)
    path = tmp_path / made.artefact_name
    assert path.suffix == f".{artefact}"
    made.save(network, example(), path)
    assert network.training
    with made.load_file(path, example()) as session:
        assert session.path == path
        assert_close(session.outputs(), expected(network, example()))
    assert path.exists()


def test_a_file_that_computes_something_else_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    made = runtime(*FAKE_DEVICE, "{model}")
    right = made.exporter.save
    other = tiny("plain", seed=1)
    monkeypatch.setattr(made.exporter, "save", lambda _, inputs, path: right(other, inputs, path))
    with pytest.raises(ExportError, match="pt2: output 0 is off"):
        made.load(tiny("plain"), example())


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError) as caught:
        runtime("ls", "{modle}", artefact="tflite", rounds=0, timeout_s=0, retries=-1)
    assert len(caught.value.problems) == 5
    assert "did you mean {model}" in str(caught.value)
    with pytest.raises(ConfigError, match=r"needs \{model\}.*\{reference\} \{inputs\}"):
        runtime("ls")
    with pytest.raises(ConfigError, match="device_name: is missing"):
        get_runtime("command", command=["ls", "{model}"])
    with pytest.raises(ConfigError, match="command"):
        CommandRuntime(command=[], device_name="")
    with pytest.raises(RuntimeUnavailableError, match="no program `/no/such`"):
        runtime("/no/such", "{model}")


def test_what_the_program_ran_the_file_with_is_its_own_word() -> None:
    line = 'time.sleep(0.01); print(\'{"samples_ms": [1.0], "library": "tflite 2.19"}\')'
    with saying(line).load(nn.ReLU(), example()) as session:
        assert session.reported_library is None
        session.elapsed_ms()
        assert session.reported_library == "tflite 2.19"


def test_a_wrong_command_is_shown_the_form() -> None:
    with pytest.raises(ConfigError) as caught:
        get_runtime("command", command="python on_phone.py {model}")
    for piece in ('command=["python", "on_phone.py", "{model}", "{rounds}"]', "device_name=phone"):
        assert piece in str(caught.value)

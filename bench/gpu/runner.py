"""`python -m bench gpu PART`: runs the jobs of one part, each watched, and loses nothing.

Jobs run in processes of their own; a crash or a hang costs one job. Every record is on disk as soon
as it exists, so a part that is cut short goes on where it stopped when it is called again, here or
from the files that it left (`--resume`). A part never outlasts its deadline.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import torch

from ..facts import facts, sentence
from .child import LOST_CONTEXT
from .job import BAD, CRASH, FAILED, HANG, NO_TIME, OK, UNAVAILABLE, Job, Record

PARTS = {name: f"bench.gpu.{name}" for name in ("check", "sanitize", "shapes", "nets")}
RESULTS = Path("bench/results/gpu")
ROOT = Path(__file__).resolve().parents[2]
START_UP = 60.0  # seconds for a child to import and open the GPU


def sources() -> str:
    """A fingerprint of what is measured: copies of a checkout may come without their history."""
    digest = hashlib.sha256()
    for folder in ("bench", "csrc", "resunet_fast"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h"):
                digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


class Part:
    """One part: its jobs, and the records that exist.

    Args:
        name: of the part and of its files.
        module: has `jobs(dry) -> list[Job]` and `table(records) -> str`.
        out: folder of NAME.jsonl (records) and NAME.txt (the table).
        resume: folder with an earlier NAME.jsonl, which may be `out`.
        dry: without a GPU: collect, import, run what can run on the smallest case.
        commit: recorded instead of what git says.
    """

    def __init__(
        self, name: str, module: str, out: Path, resume: Path, dry: bool, commit: str = ""
    ) -> None:
        self.name, self.module, self.dry = name, module, dry
        self.jobs: dict[str, Job] = {job.name: job for job in import_module(module).jobs(dry)}
        head: Record = {"part": name, "job": "machine", "status": OK, **facts()}
        head.update(sources=sources(), dry=dry, architecture=_architecture())
        head.update({"commit": commit} if commit else {})
        self.path, self.text = out / f"{name}.jsonl", out / f"{name}.txt"
        earlier = _earlier([self.path, resume / f"{name}.jsonl"], head)
        out.mkdir(parents=True, exist_ok=True)
        self.records: list[Record] = []
        self.file = self.path.open("w", encoding="utf-8")
        self.write(head)
        for record in earlier:
            if record["job"] in self.jobs and record["status"] != NO_TIME:
                self.write(record)

    def write(self, record: Record) -> None:
        self.records.append(record)
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def add(self, record: Record) -> None:
        """Keep a record and show its line."""
        self.write({"part": self.name, **record})
        note = str(record.get("note", "")).strip().replace("\n", " ")[:160]
        print(f"{record['status']:<12}{record['job']}  {note}".rstrip(), flush=True)

    def left(self) -> list[str]:
        done = {record["job"] for record in self.records}
        return [name for name in self.jobs if name not in done]

    def finish(self) -> int:
        """Print and keep the table; the exit status: 0 good, 1 bad, 3 incomplete."""
        known = [record for record in self.records if record["job"] != "machine"]
        bad = [r for r in known if r["status"] in BAD]
        waiting = [r for r in known if r["status"] == NO_TIME]
        lines = [import_module(self.module).table(self.records)]
        lines += [f"{r['status']:<12}{r['job']}: {r.get('note', '')}" for r in (*bad, *waiting)]
        counts = {s: sum(r["status"] == s for r in known) for s in {r["status"] for r in known}}
        lines.append(", ".join(f"{count} {status}" for status, count in sorted(counts.items())))
        verdict = "FAILED" if bad else "INCOMPLETE, call it again to go on" if waiting else "OK"
        lines += [sentence(self.records[0]), f"{self.name}: {verdict}"]
        self.text.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.file.close()
        print("\n" + "\n".join(lines))
        return 1 if bad else 3 if waiting else 0


def _earlier(paths: list[Path], head: Record) -> list[Record]:
    """Records of the same sources on the same machine, from the first file that has any."""
    for path in paths:
        if not path.exists():
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        # A line that was being written when the machine went away is not a record.
        records = [record for record in map(_parsed, lines) if record is not None]
        if records and _identity(records[0]) == _identity(head):
            return records[1:]
    return []


def _identity(head: Record) -> tuple[object, ...]:
    """What must agree for records to be of one run."""
    return head.get("sources"), head.get("dry"), head["machine"]["gpu"]


def _parsed(line: str) -> Record | None:
    try:
        record: Record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record


def watch(part: Part, until: float) -> None:
    """Run what is left, one process after the other, until it is done or time is up."""
    while left := part.left():
        if time.monotonic() >= until:
            break
        first = part.jobs[left[0]]
        batch = [left[0]] if first.fresh else [n for n in left if not part.jobs[n].fresh]
        _watch_one(part, batch, until)
    for name in part.left():
        part.add({"job": name, "status": NO_TIME})


def _watch_one(part: Part, names: list[str], until: float) -> None:
    """Run some jobs in one process; a job that ends it gets a record, the others stay left."""
    command = [sys.executable, "-u", "-m", "bench.gpu.child", part.module]
    command += ["dry" if part.dry else "real", *names]
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env={**os.environ, **environment(part.dry)},
            start_new_session=True,
        )
        current, why = _listen(part, child, until)
        if why:
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        if why == NO_TIME or (child.returncode == 0 and not why):
            return
        if child.returncode == LOST_CONTEXT and current is None:
            return
        errors.seek(0)
        note = f"exit {child.returncode}: " + errors.read().strip()[-400:]
    # A process that dies before its first job would do so again and again; one that dies after its
    # last has done its work.
    guilty = current or next((name for name in names if name in part.left()), None)
    if guilty is not None:
        part.add({"job": guilty, "status": why or CRASH, "note": note})


def environment(dry: bool) -> dict[str, str]:
    cache = Path(tempfile.gettempdir()) / "resunet_fast_bench"
    caches = {
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
    }
    if not dry:
        return caches
    return {**caches, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}


def _listen(part: Part, child: subprocess.Popen[str], until: float) -> tuple[str | None, str]:
    """Keep records as they come; the job that was begun and has none, and HANG or NO TIME."""
    assert child.stdout is not None
    lines = _lines(child.stdout)
    current, patience = None, START_UP
    while True:
        wait = min(patience, until - time.monotonic())
        try:
            line = lines.get(timeout=max(wait, 0.01))
        except queue.Empty:
            return current, HANG if time.monotonic() < until else NO_TIME
        if line is None:
            return current, ""
        if not line.startswith("@{"):
            print(line, end="", flush=True)
        elif "begin" in (record := json.loads(line[1:])):
            current = record["begin"]
            patience = part.jobs[current].patience
        else:
            part.add(record)
            current, patience = None, START_UP


def _lines(stream: IO[str]) -> queue.Queue[str | None]:
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def build(seconds: float) -> Record:
    """Compile the extension in place for this machine; what it says, as a record."""
    record: Record = {"job": "build"}
    if shutil.which("nvcc") is None:
        return {**record, "status": UNAVAILABLE, "note": "nvcc was not found"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    # One architecture, in the words that setup.py reads.
    number = _architecture().removeprefix("sm_")
    for_one = {**os.environ, "RESUNET_FAST_CUDA_ARCHS": number}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=for_one, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {**record, "status": FAILED, "note": f"not built within {seconds:.0f} s"}
    last = (done.stderr or done.stdout).strip()[-400:]
    return {**record, "status": OK if done.returncode == 0 else FAILED, "note": last}


def _architecture() -> str:
    """Of the GPU, such as sm_90; empty without one."""
    if not torch.cuda.is_available():
        return ""
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def run_part(part: Part, deadline: float) -> int:
    until = time.monotonic() + deadline
    if not part.dry:
        part.add(build(deadline / 2))
    watch(part, until)
    return part.finish()


def parts(name: str) -> Iterator[tuple[str, str]]:
    for each, module in PARTS.items():
        if name in (each, "all"):
            yield each, module


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("part", choices=(*PARTS, "all"))
    parser.add_argument("--dry", action="store_true", help="what can be shown without a GPU")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", str(RESULTS))))
    parser.add_argument("--resume", type=Path, default=RESULTS, help="folder of earlier results")
    parser.add_argument("--deadline", type=float, default=450.0, help="seconds per part")
    parser.add_argument("--commit", default="", help="recorded where git does not know it")


def main(options: Any) -> int:
    if not options.dry and not torch.cuda.is_available():
        print("no NVIDIA GPU that torch can use; DRY=1 shows what can be shown without one")
        return 2
    # The jobs are listed here as the children will see them.
    os.environ.update(environment(options.dry))
    status = 0
    for name, module in parts(options.part):
        part = Part(name, module, options.out, options.resume, options.dry, options.commit)
        status = max(status, run_part(part, options.deadline))
    return status

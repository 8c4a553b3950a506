"""wandb's own client, online, against a server that answers just enough: what a run sends, and that a run gone on with is the same one.

Slow, as the client takes its time, and its protocol is wandb's to change.
"""

import gzip
import json
import shutil
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from rdtrain.metrics import read_metrics

PROJECT = {"id": "p", "name": "rdtrain", "entity": {"id": "e", "name": "someone"}}


class Wandb(BaseHTTPRequestHandler):
    """Keeps the history of each run, by its id, as lines of JSON."""

    history: dict[str, list[str]]

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        if self.path.endswith("/file_stream"):
            lines = json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self.history.setdefault(self.path.split("/")[-2], []).extend(lines)
            self.answer({"exitcode": None, "limits": {}})
        elif self.path.endswith("/graphql"):
            asked = json.loads(body)
            self.answer({"data": self.data(asked["operationName"], asked.get("variables", {}).get("name"))})
        else:
            self.answer({})

    def data(self, operation: str, run: str | None) -> dict:
        """What the client's questions and orders are answered with."""
        there = self.history.get(run)
        if operation == "RunResumeStatus":
            count = {"historyLineCount": len(there or []), "eventsLineCount": 0, "logLineCount": 0}
            tails = {"historyTail": json.dumps((there or [])[-1:]), "eventsTail": "[]"}
            kept = {"id": run, "name": run, "summaryMetrics": "{}", "config": "{}", "tags": [], "wandbConfig": "{}"} | count | tails
            return {"model": PROJECT | {"bucket": None if there is None else kept}}
        if operation == "UpsertBucket":
            self.history.setdefault(run, [])
            bucket = {"id": run, "name": run, "displayName": run, "project": PROJECT, "historyLineCount": len(there or [])}
            return {"upsertBucket": {"bucket": bucket, "inserted": there is None}}
        if operation == "CreateRunFiles":
            return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": []}}
        return {"viewer": {"id": "u", "entity": "someone", "username": "someone", "flags": "{}", "teams": {"edges": []}}, "entity": None}

    def answer(self, tree: dict) -> None:
        """Send it."""
        body = json.dumps(tree).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        """Nothing."""


@pytest.mark.slow
def test_a_run_sends_its_records_and_goes_on_as_the_same_run(tiny_config, tmp_path, rdtrain, monkeypatch):
    handler = type("Kept", (Wandb,), {"history": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    path = tiny_config(logging={"wandb": "online"})
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    result = rdtrain("train", "--config", path, forked=False)
    assert result.returncode == 0, result.stderr
    (run,), records = handler.history, read_metrics(tmp_path / "run/metrics.jsonl")
    sent = [json.loads(line) for line in handler.history[run]]
    assert [row["step"] for row in sent] == [record["step"] for record in records] == list(range(9))
    assert [row["loss"] for row in sent[1:]] == pytest.approx([record["loss"] for record in records[1:]])
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000008")
    handler.history[run] = handler.history[run][:5]  # as if it had been stopped after step 4
    result = rdtrain("train", "--config", path, forked=False)
    server.shutdown()
    assert result.returncode == 0 and list(handler.history) == [run], result.stderr
    assert [json.loads(line)["step"] for line in handler.history[run]] == list(range(9))

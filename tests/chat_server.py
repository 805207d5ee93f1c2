"""A chat server on this machine that knows the good answer, and fails as it is told to."""

import json
import os
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

GOOD, BAD = "a good answer", "a bad answer, and a longer one"
FORM = "<think>hm</think><generate_rubrics>none</generate_rubrics><eval>so</eval><answer>{}</answer>"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}


class Chat(BaseHTTPRequestHandler):
    """A chat server that knows the good answer, and fails as its `plan` says before it answers."""

    # What to do to the next requests: "429", "nonsense", "slow" and so on, as do_POST has them, or a function from the
    # request to (status, content) or (status, content, headers).
    plan: list
    always = ""  # the same for every later request
    asked: list
    times: list
    retry_after = "0.1"
    lock = threading.Lock()

    def do_GET(self):
        self.reply(200, {"data": [{"id": "served-judge"}]})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            self.asked.append(request)
            self.times.append(time.monotonic())
            do = self.plan.pop(0) if self.plan else type(self).always
        if callable(do):
            status, content, *headers = do(request)
            self.reply(status, content, **(headers[0] if headers else {}))
            return
        if do in ("slow", "slower"):
            time.sleep(1.5 if do == "slow" else 4)
        if do == "trickle":  # a byte now and then, without an end
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):
                for _ in range(200):
                    self.wfile.write(b" ")
                    time.sleep(0.1)
            return
        if do == "hang up":
            self.connection.close()
            return
        if do in ("429", "500", "400", "401", "403", "404"):
            self.reply(int(do), {"error": do}, **({"Retry-After": self.retry_after} if do == "429" else {}))
        elif do == "quota":
            self.reply(429, {"error": {"code": "insufficient_quota"}})
        elif do in ("cut", "nothing"):
            said = answer_to(request)
            said["choices"][0]["finish_reason"] = "length"
            said["choices"][0]["message"] = {"content": "<think>hm" if do == "cut" else ""}
            self.reply(200, said)
        elif do == "nested":
            self.reply(200, b"[" * 100_000)
        elif "tokens" in do:
            said = answer_to(request)
            count = {"tokens without end": 1e999, "tokens beyond count": 2**31, "no tokens": None}[do]
            said["usage"]["completion_tokens"] = count
            self.reply(200, said)
        elif do == "too long":
            self.reply(400, {"error": {"message": "This model's maximum context length is 8 tokens."}})
        elif do == "unread":
            self.reply(200, {"choices": [{"message": {"content": "I cannot say."}, "finish_reason": "stop"}]})
        elif do == "nonsense":
            self.reply(200, None)
        elif do == "empty":
            self.reply(200, {"choices": []})
        elif do == "thinks":  # thinking of the model's own, and the whole form behind it
            said = answer_to(request)
            message = said["choices"][0]["message"]
            message["content"] = f"<think>{message['reasoning_content']}</think>{message['content']}"
            message["reasoning_content"] = "Let me see."
            self.reply(200, said)
        else:
            self.reply(200, answer_to(request))

    def reply(self, status, content, **headers):
        data = b"<html>" if content is None else content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers | {"Content-Length": len(data)}).items():
            self.send_header(name, str(value))
        self.end_headers()
        with suppress(BrokenPipeError):  # whoever asked is gone
            self.wfile.write(data)

    def log_message(self, *arguments):
        pass


def answer_to(request):
    user = request["messages"][-1]["content"]
    if "<response_a>" in user:
        said = FORM.format("A" if user.index(GOOD) < user.index(BAD) else "B")
    else:
        said = FORM.format(9 if GOOD in user else 2)
    thinking, rest = said.removeprefix("<think>").split("</think>")
    message = {"role": "assistant", "content": rest, "reasoning_content": thinking}
    return {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"completion_tokens": 12}}


def completion(content, finish="stop", tokens=20, choice=(), **message):
    message = {"role": "assistant", "content": content, **message}
    choices = [{"index": 0, "message": message, "finish_reason": finish, **dict(choice)}]
    return {"object": "chat.completion", "choices": choices, "usage": {"completion_tokens": tokens}}


@contextmanager
def served(*plan, always=""):
    members = {"plan": list(plan), "asked": [], "times": []}
    members["always"] = staticmethod(always) if callable(always) else always
    handler = type("Handler", (Chat,), members)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", handler
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def write_pairs(folder):
    rows = [
        {"prompt": f"Topic {n}", "chosen": f"{GOOD} {n}", "rejected": f"{BAD} {n}", "domain": "chat"} for n in range(6)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(defaults, more):
    """Flags with their values; of those in `more` not the defaults, since an option is given once."""
    more = [str(word) for word in more]
    return [str(word) for flag in defaults.items() if flag[0] not in more for word in flag] + more


def remote(folder, url, *more, output="out", benchmark="pairs"):
    defaults = {"--data": folder / "pairs.jsonl", "--output": folder / output, "--endpoint.url": url}
    return ["eval", benchmark, *settings(defaults | {"--endpoint.concurrency": 4}, more)]


def overall(folder, output="out", rule="strict"):
    results = json.loads((folder / output / "results.json").read_text())
    return results, results["scores"][rule]["overall"]["accuracy"]["value"]

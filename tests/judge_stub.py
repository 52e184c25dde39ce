"""A server of chat completions on this machine, for judges behind an endpoint."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def endpoint(answer):
    """
    A server of chat completions. `answer(question, count)` gives the reply, or a tuple of status, headers and body;
    `count` is how often this question was asked before.
    """
    seen: list[dict] = []
    asked: dict[str, int] = {}
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            question = body["messages"][0]["content"]
            key = json.dumps(question)  # a text, or a list of texts and images
            with lock:
                count = asked.get(key, 0)
                asked[key] = count + 1
                seen.append({"path": self.path, "key": self.headers.get("Authorization"), "body": body})
            result = answer(question, count)
            if not isinstance(result, tuple):
                result = (200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": result}}]}))
            status, headers, text = result
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(text.encode()))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def shown(question: str) -> tuple[str, str]:
    """The two responses in a question of the default template."""
    first = question.split("### Response A\n")[1].split("\n\n### Response B\n")[0]
    return first, question.split("### Response B\n")[1].split("\n\n### Verdict")[0]


def prefers_longer(question, count=0):
    first, second = shown(question)
    return "T" if len(first) == len(second) else "A" if len(first) > len(second) else "B"

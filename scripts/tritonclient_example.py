"""NVIDIA's client against an APAR service: branches live over gRPC, or an answer over HTTP.

apar serve tiny --triton-address 127.0.0.1                # in another terminal
scripts/tritonclient_example.py "How do I grow tomatoes?"
scripts/tritonclient_example.py "How do I grow tomatoes?" --http localhost:8003
scripts/tritonclient_example.py "How do I grow tomatoes?" --http localhost:8003 --stream
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.request

from apar.export.errors import AparError
from apar.runtime.serving.grpc_view import show_answers


def over_http(address: str, prompt: str, max_tokens: int, stream: bool) -> None:
    """The answer from `generate` as a whole, or from `generate_stream` as it comes."""
    way = "generate_stream" if stream else "generate"
    body = json.dumps({"text_input": prompt, "max_tokens": max_tokens, "stream": stream}).encode()
    request = urllib.request.Request(f"http://{address}/v2/models/apar/{way}", body)
    with urllib.request.urlopen(request, timeout=600) as response:
        for line in response:
            # generate_stream: one `data: {...}` line for each response, with empty lines between them.
            text = line.decode().removeprefix("data:").strip()
            if text:
                message = json.loads(text)
                if "error" in message:
                    raise AparError(message["error"])
                print(message["text_output"], end="", flush=True)
    print()


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", metavar="PROMPT", nargs="+", help="what to ask; several are asked at the same time")
    parser.add_argument("--url", default="localhost:8001", help="of Triton's gRPC (default: %(default)s)")
    parser.add_argument("--http", metavar="ADDRESS", help="use HTTP at this address instead")
    parser.add_argument("--stream", action="store_true", help="with --http: the answer as it comes")
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--no-fork", action="store_true", help="plain decoding: no branches")
    parser.add_argument("--pace", type=float, default=0.0, metavar="SECONDS", help="least time of a step on the screen")
    options = parser.parse_args()
    try:
        if options.http:
            for prompt in options.prompts:
                over_http(options.http, prompt, options.max_tokens, options.stream)
        else:
            inputs = {"max_tokens": options.max_tokens, "fork": not options.no_fork, "branch_events": True}
            requests = [(prompt, {**inputs, "text_input": prompt}) for prompt in options.prompts]
            show_answers(options.url, requests, pace=options.pace)
    except (AparError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

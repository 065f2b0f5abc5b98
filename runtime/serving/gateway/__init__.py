"""The gateway: OpenAI's API over HTTP in front of the Triton server, with limits on everything a client may send."""

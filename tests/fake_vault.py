"""A stand-in for Vault: the part of its transit engine's HTTP API that this project uses, on loopback."""

from __future__ import annotations

import base64
import http.server
import json
import secrets
import threading
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM


class FakeVault:
    """Vault's transit engine over HTTP on loopback, for one key: encrypt, decrypt, rotate, minimum version."""

    def __init__(self, key_name: str, token: str) -> None:
        self._name, self._token = key_name, token
        self._keys = {1: secrets.token_bytes(32)}
        self._min_version = 1
        self.allowed = {"encrypt", "decrypt", "rotate", "config"}
        self.redirect_to: str | None = None

    def __enter__(self) -> FakeVault:
        vault = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, reply = vault._answer(self.path, self.headers.get("X-Vault-Token"), body)
                data = json.dumps(reply).encode()
                self.send_response(status)
                if vault.redirect_to:
                    self.send_header("Location", vault.redirect_to)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, path: str, token: str | None, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if self.redirect_to:
            return 307, {}
        name = self._name
        actions = {
            f"/v1/transit/encrypt/{name}": ("encrypt", self._encrypt),
            f"/v1/transit/decrypt/{name}": ("decrypt", self._decrypt),
            f"/v1/transit/keys/{name}/rotate": ("rotate", self._rotate),
            f"/v1/transit/keys/{name}/config": ("config", self._configure),
        }
        what, act = actions.get(path, ("", None))
        if token != self._token or what not in self.allowed or act is None:
            return 403, {"errors": ["permission denied"]}
        return 200, {"data": act(body)}

    def _encrypt(self, body: dict[str, Any]) -> dict[str, Any]:
        version, nonce = max(self._keys), secrets.token_bytes(12)
        sealed = nonce + AESGCM(self._keys[version]).encrypt(nonce, base64.b64decode(body["plaintext"]), None)
        return {"ciphertext": f"vault:v{version}:{base64.b64encode(sealed).decode()}", "key_version": version}

    def _decrypt(self, body: dict[str, Any]) -> dict[str, Any]:
        _, version, text = body["ciphertext"].split(":")
        assert int(version[1:]) >= self._min_version
        sealed = base64.b64decode(text)
        plain = AESGCM(self._keys[int(version[1:])]).decrypt(sealed[:12], sealed[12:], None)
        return {"plaintext": base64.b64encode(plain).decode()}

    def _rotate(self, _: dict[str, Any]) -> dict[str, Any]:
        self._keys[max(self._keys) + 1] = secrets.token_bytes(32)
        return {}

    def _configure(self, body: dict[str, Any]) -> dict[str, Any]:
        self._min_version = body["min_decryption_version"]
        return {}

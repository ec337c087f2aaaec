#!/usr/bin/env python3
# Copyright (c) The vault-plugin-secrets-mojoauth authors
# SPDX-License-Identifier: MPL-2.0
"""Calls an API that MojoAuth protects, with an access token from Vault.

See examples/README.md for the variables.
"""

import http.client
import json
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, which could send the token to another host."""

    def redirect_request(self, *args):
        return None


opener = urllib.request.build_opener(NoRedirect)


def setting(name, default=None):
    value = os.environ.get(name) or default
    if value is None:
        raise ValueError(f"{name} is not set")
    return value


def bare(name, value):
    """Return the token if it fits into a header. http.client would show a
    malformed one in its error."""
    if not re.fullmatch("[!-~]+", value):
        raise ValueError(f"{name} is not a bare token")
    return value


def get(url, **headers):
    """Return the status and the body, also of a 4xx or 5xx."""
    request = urllib.request.Request(url, headers=headers)
    try:
        response = opener.open(request, timeout=30)
    except urllib.error.HTTPError as error:
        response = error
    except urllib.error.URLError as error:
        raise ConnectionError(f"no response from {url}: {error.reason}") from error
    with response:
        return response.status, response.read().decode(errors="replace").strip()


class FileSource:
    """Reads the file for every call, because Vault Agent replaces it."""

    def token(self, refused):
        with open(setting("TOKEN_FILE"), encoding="ascii", errors="replace") as file:
            return bare("TOKEN_FILE", file.read().strip())


class VaultSource:
    """Reads from Vault, and caches the token for the ttl that Vault returns."""

    def __init__(self):
        mount, role = setting("MOUNT", "mojoauth"), setting("ROLE", "demo")
        self.url = f"{setting('VAULT_ADDR').rstrip('/')}/v1/{mount}/creds/{role}"
        self.headers = {"X-Vault-Token": bare("VAULT_TOKEN", setting("VAULT_TOKEN"))}
        self.cached, self.minted_at, self.read_again = None, None, 0

    def token(self, refused):
        now = time.monotonic()
        if refused or self.cached is None or now >= self.read_again:
            url = self.url
            if refused:
                # A token that is newer than the refused one.
                url += "?" + urllib.parse.urlencode({"minted_after": self.minted_at})
            status, body = get(url, **self.headers)
            if status == 429 or status >= 500:
                # Vault restarts a killed plugin at the next request. After a 429,
                # fewer token requests may be waiting by then.
                time.sleep(1)
                status, body = get(url, **self.headers)
            if status != 200:
                raise ValueError(f"Vault returned {status}: {error_text(body)}")
            data = json.loads(body)["data"]
            self.cached = bare("access_token", data["access_token"])
            self.minted_at, self.read_again = data["last_vault_rotation"], now + data["ttl"]
        return self.cached


def error_text(body):
    try:
        body = "; ".join(json.loads(body)["errors"]) or body
    except (ValueError, LookupError, TypeError):
        pass  # not from Vault, but from something in front of it
    return " ".join(body.split())


def call_api(source, refused=False):
    return get(setting("API_URL"), Authorization=f"Bearer {source.token(refused)}")


def main():
    source = FileSource() if os.environ.get("TOKEN_FILE") else VaultSource()
    for call in range(int(setting("CALLS", "1"))):
        if call > 0:
            time.sleep(float(setting("INTERVAL", "1")))
        status, body = call_api(source)
        if status == 401:
            # The API may accept a newer token. Try only once: a second 401 has
            # another cause.
            status, body = call_api(source, refused=True)
        if not 200 <= status <= 299:
            raise ValueError(f"the API returned {status}: {body}")
        print(status, body, flush=True)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, LookupError, http.client.HTTPException) as error:
        sys.exit(f"call_api: {error}")

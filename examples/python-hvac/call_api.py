#!/usr/bin/env python3
# Copyright (c) The vault-plugin-secrets-mojoauth authors
# SPDX-License-Identifier: MPL-2.0
"""Reads an access token from Vault with hvac and calls an API that MojoAuth
protects.

See examples/README.md for the environment variables.
"""

import os
import sys
import time
import urllib.parse

import hvac
import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry


def setting(name, default=None):
    value = os.environ.get(name) or default
    if value is None:
        raise ValueError(f"{name} is not set")
    return value


def vault_client():
    # hvac reads VAULT_CACERT on import, but ignores it if you pass a session
    # here. Mount the adapter on the client's session instead.
    client = hvac.Client(url=setting("VAULT_ADDR"), token=setting("VAULT_TOKEN"))
    # hvac does not retry. Retry immediately, then after two seconds, or after
    # the time in Retry-After, and use the last response.
    retry = Retry(
        total=int(setting("VAULT_MAX_RETRIES", "2")),
        backoff_factor=1,
        status_forcelist=[412, 429, 500, 502, 503, 504],
        raise_on_status=False,
    )
    for scheme in "http://", "https://":
        client.session.mount(scheme, HTTPAdapter(max_retries=retry))
    return client


class VaultSource:
    """Reads a token from Vault and keeps it for the token's ttl."""

    def __init__(self, client):
        self.client = client
        self.path = f"{setting('MOUNT', 'mojoauth')}/creds/{setting('ROLE', 'demo')}"
        self.cached, self.minted_at, self.read_again = None, None, 0

    def token(self, refused):
        now = time.monotonic()
        if refused or self.cached is None or now >= self.read_again:
            path = self.path
            if refused:
                # Request a token minted later than the one that the API refused.
                path += "?" + urllib.parse.urlencode({"minted_after": self.minted_at})
            answer = self.client.read(path)
            if answer is None:  # a 404; hvac drops the text
                raise ValueError(f"Vault answered 404: nothing is at {self.path}")
            data = answer["data"]
            self.cached, self.minted_at = data["access_token"], data["last_vault_rotation"]
            self.read_again = now + data["ttl"]
        return self.cached


def call_api(source, refused=False):
    headers = {"Authorization": f"Bearer {source.token(refused)}"}
    # A redirect could send the token to another host.
    response = requests.get(setting("API_URL"), headers=headers, timeout=30, allow_redirects=False)
    return response.status_code, response.text.strip()


def main():
    setting("API_URL")
    source = VaultSource(vault_client())
    for call in range(int(setting("CALLS", "1"))):
        if call > 0:
            time.sleep(float(setting("INTERVAL", "1")))
        status, body = call_api(source)
        if status == 401:
            # The API may accept a newer token. Retry once: a second 401 has
            # another cause.
            status, body = call_api(source, refused=True)
        if not 200 <= status <= 299:
            raise ValueError(f"the API answered {status}: {body}")
        print(status, body, flush=True)


if __name__ == "__main__":
    try:
        main()
    except hvac.exceptions.VaultError as error:
        # Only the name of the exception's class shows the status.
        text = "; ".join(error.errors or [error.text or ""])
        sys.exit(f"call_api: Vault answered {type(error).__name__}: {' '.join(text.split())}")
    except (OSError, ValueError, LookupError) as error:
        sys.exit(f"call_api: {error}")

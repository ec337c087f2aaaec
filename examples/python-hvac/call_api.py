#!/usr/bin/env python3
# Copyright (c) The vault-plugin-secrets-mojoauth authors
# SPDX-License-Identifier: MPL-2.0
"""Calls an API that MojoAuth protects, with an access token that it reads from
Vault with hvac.

See examples/README.md for the variables.
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
    # VAULT_CACERT is read when hvac is imported. A session that is passed in
    # here would make hvac ignore it, which is why the adapter comes later.
    client = hvac.Client(url=setting("VAULT_ADDR"), token=setting("VAULT_TOKEN"))
    # hvac itself tries once. The first retry is at once, the second two seconds
    # later, or when a Retry-After says. The last answer counts.
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
    """Reads from Vault, and keeps the token as long as Vault says."""

    def __init__(self, client):
        self.client = client
        self.path = f"{setting('MOUNT', 'mojoauth')}/creds/{setting('ROLE', 'demo')}"
        self.cached, self.minted_at, self.read_again = None, None, 0

    def token(self, refused):
        now = time.monotonic()
        if refused or self.cached is None or now >= self.read_again:
            path = self.path
            if refused:
                # One that was minted later than the one that the API refused.
                path += "?" + urllib.parse.urlencode({"minted_after": self.minted_at})
            answer = self.client.read(path)
            if answer is None:  # a 404, whose text hvac drops
                raise ValueError(f"Vault answered 404: nothing is at {self.path}")
            data = answer["data"]
            self.cached, self.minted_at = data["access_token"], data["last_vault_rotation"]
            self.read_again = now + data["ttl"]
        return self.cached


def call_api(source, refused=False):
    headers = {"Authorization": f"Bearer {source.token(refused)}"}
    # A redirect could take the token to another host.
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
            # A newer token may be accepted. Once is enough: a second 401 is
            # about something else.
            status, body = call_api(source, refused=True)
        if not 200 <= status <= 299:
            raise ValueError(f"the API answered {status}: {body}")
        print(status, body, flush=True)


if __name__ == "__main__":
    try:
        main()
    except hvac.exceptions.VaultError as error:
        # The status is in the name of the error's class only.
        text = "; ".join(error.errors or [error.text or ""])
        sys.exit(f"call_api: Vault answered {type(error).__name__}: {' '.join(text.split())}")
    except (OSError, ValueError, LookupError) as error:
        sys.exit(f"call_api: {error}")

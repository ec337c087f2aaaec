// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

// Reads an access token from Vault with node-vault and calls an API that
// MojoAuth protects. See examples/README.md for the environment variables.

import { readFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import nodeVault from 'node-vault';

function setting(name, fallback) {
  const value = process.env[name] || fallback;
  if (value === undefined) throw new Error(`${name} is not set`);
  return value;
}

function vaultClient() {
  // node-vault has no default timeout and does not read VAULT_CACERT.
  const requestOptions = { timeout: 30_000 };
  if (process.env.VAULT_CACERT) requestOptions.ca = readFileSync(process.env.VAULT_CACERT);
  return nodeVault({ endpoint: setting('VAULT_ADDR'), token: setting('VAULT_TOKEN'), requestOptions });
}

// node-vault does not retry. This function retries one second after a 412, a
// 429, a 5xx, or a failed connection.
async function read(vault, path) {
  for (let retries = Number(setting('VAULT_MAX_RETRIES', '2')); ; retries--) {
    try {
      return await vault.read(path);
    } catch (error) {
      const status = error.response?.statusCode;
      const again = status === undefined || status === 412 || status === 429 || status >= 500;
      if (!again || retries <= 0) {
        // Don't pass on the error itself: its headers may contain the Vault token.
        const lines = error.response?.body?.errors?.join('; ') || error.message;
        const text = lines.replace(/\s+/g, ' ').trim();
        throw new Error(status ? `Vault answered ${status}: ${text}` : `no answer from Vault: ${text || error.code}`);
      }
    }
    await sleep(1000);
  }
}

// tokenSource returns a function that reads a token from Vault and keeps it for
// the token's ttl.
function tokenSource(vault) {
  const path = `${setting('MOUNT', 'mojoauth')}/creds/${setting('ROLE', 'demo')}`;
  let cached;
  let mintedAt;
  let readAgain = 0;
  return async ({ refused }) => {
    const now = performance.now();
    if (cached && !refused && now < readAgain) return cached;
    // Request a token minted later than the one that the API refused.
    const query = refused ? `?minted_after=${encodeURIComponent(mintedAt)}` : '';
    const { data } = await read(vault, path + query);
    if (!data?.access_token) throw new Error('Vault answered without a token');
    cached = data.access_token;
    mintedAt = data.last_vault_rotation;
    readAgain = now + data.ttl * 1000;
    return cached;
  };
}

async function callAPI(token, { refused }) {
  const url = setting('API_URL');
  const options = {
    headers: { Authorization: `Bearer ${await token({ refused })}` },
    redirect: 'manual', // a redirect could send the token to another host
    signal: AbortSignal.timeout(30_000),
  };
  try {
    const response = await fetch(url, options);
    return { status: response.status, body: (await response.text()).trim() };
  } catch (error) {
    // fetch reports only that it failed; the cause has the reason.
    throw new Error(`no answer from ${url}: ${error.cause?.message || error.cause?.code || error.message}`);
  }
}

async function main() {
  setting('API_URL');
  const token = tokenSource(vaultClient());
  const calls = Number(setting('CALLS', '1'));
  for (let call = 0; call < calls; call++) {
    if (call > 0) await sleep(Number(setting('INTERVAL', '1')) * 1000);
    let { status, body } = await callAPI(token, { refused: false });
    if (status === 401) {
      // The API may accept a newer token. Retry once: a second 401 has
      // another cause.
      ({ status, body } = await callAPI(token, { refused: true }));
    }
    if (status < 200 || status > 299) throw new Error(`the API answered ${status}: ${body}`);
    console.log(status, body);
  }
}

try {
  await main();
} catch (error) {
  console.error(`call-api: ${error.message}`);
  process.exitCode = 1;
}

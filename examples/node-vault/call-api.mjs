// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

// Calls an API that MojoAuth protects, with an access token that it reads from
// Vault with node-vault. See examples/README.md for the variables.

import { readFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import nodeVault from 'node-vault';

function setting(name, otherwise) {
  const value = process.env[name] || otherwise;
  if (value === undefined) throw new Error(`${name} is not set`);
  return value;
}

function vaultClient() {
  // node-vault sets no time limit, and does not know VAULT_CACERT.
  const requestOptions = { timeout: 30_000 };
  if (process.env.VAULT_CACERT) requestOptions.ca = readFileSync(process.env.VAULT_CACERT);
  return nodeVault({ endpoint: setting('VAULT_ADDR'), token: setting('VAULT_TOKEN'), requestOptions });
}

// node-vault tries once. This one tries again a second after a 412, a 429 or a
// 5xx, and when there was no answer.
async function read(vault, path) {
  for (let retries = Number(setting('VAULT_MAX_RETRIES', '2')); ; retries--) {
    try {
      return await vault.read(path);
    } catch (error) {
      const status = error.response?.statusCode;
      const again = status === undefined || status === 412 || status === 429 || status >= 500;
      if (!again || retries <= 0) {
        // Not the error itself: it may hold the Vault token, in the headers.
        const lines = error.response?.body?.errors?.join('; ') || error.message;
        const text = lines.replace(/\s+/g, ' ').trim();
        throw new Error(status ? `Vault answered ${status}: ${text}` : `no answer from Vault: ${text || error.code}`);
      }
    }
    await sleep(1000);
  }
}

// A source reads from Vault, and keeps the token as long as Vault says.
function tokenSource(vault) {
  const path = `${setting('MOUNT', 'mojoauth')}/creds/${setting('ROLE', 'demo')}`;
  let cached;
  let mintedAt;
  let readAgain = 0;
  return async ({ refused }) => {
    const now = performance.now();
    if (cached && !refused && now < readAgain) return cached;
    // One that was minted later than the one that the API refused.
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
    redirect: 'manual', // a redirect could take the token to another host
    signal: AbortSignal.timeout(30_000),
  };
  try {
    const response = await fetch(url, options);
    return { status: response.status, body: (await response.text()).trim() };
  } catch (error) {
    // fetch itself only says that it failed; why is in the cause.
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
      // A newer token may be accepted. Once is enough: a second 401 is about
      // something else.
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

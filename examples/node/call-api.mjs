// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

// Calls an API that MojoAuth protects, with an access token from Vault. See
// examples/README.md for the variables.

import { readFile } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';

function setting(name, otherwise) {
  const value = process.env[name] || otherwise;
  if (value === undefined) throw new Error(`${name} is not set`);
  return value;
}

// Returns the token if it fits into a header. fetch would show a malformed one in
// its error.
function bare(name, value) {
  if (!/^[!-~]+$/.test(value)) throw new Error(`${name} is not a bare token`);
  return value;
}

async function get(url, headers) {
  // A redirect could send the token to another host.
  const options = { headers, redirect: 'manual', signal: AbortSignal.timeout(30_000) };
  try {
    const response = await fetch(url, options);
    return { status: response.status, body: (await response.text()).trim() };
  } catch (error) {
    // fetch reports only that it failed. The reason is in the cause.
    const why = error.cause?.message || error.cause?.code || error.message;
    throw new Error(`no response from ${url}: ${why}`);
  }
}

// Reads the file for every call, because Vault Agent replaces it.
async function tokenOfFile() {
  return bare('TOKEN_FILE', (await readFile(setting('TOKEN_FILE'), 'utf8')).trim());
}

let cached;
let mintedAt;
let readAgain = 0;

// Reads from Vault, and caches the token for the ttl that Vault returns.
async function tokenOfVault({ refused }) {
  const now = performance.now();
  if (cached && !refused && now < readAgain) return cached;

  const address = setting('VAULT_ADDR').replace(/\/$/, '');
  let url = `${address}/v1/${setting('MOUNT', 'mojoauth')}/creds/${setting('ROLE', 'demo')}`;
  // A token that is newer than the refused one.
  if (refused) url += `?minted_after=${encodeURIComponent(mintedAt)}`;
  const headers = { 'X-Vault-Token': bare('VAULT_TOKEN', setting('VAULT_TOKEN')) };
  let { status, body } = await get(url, headers);
  if (status === 429 || status >= 500) {
    // Vault restarts a killed plugin at the next request. After a 429, fewer
    // token requests may be waiting by then.
    await sleep(1000);
    ({ status, body } = await get(url, headers));
  }
  if (status !== 200) throw new Error(`Vault returned ${status}: ${errorText(body)}`);
  const { data } = JSON.parse(body);
  cached = bare('access_token', data.access_token);
  mintedAt = data.last_vault_rotation;
  readAgain = now + data.ttl * 1000;
  return cached;
}

function errorText(body) {
  let text = body;
  try {
    text = JSON.parse(body).errors.join('; ') || body;
  } catch {
    // Not from Vault, but from something in front of it.
  }
  return text.replace(/\s+/g, ' ').trim();
}

const token = process.env.TOKEN_FILE ? tokenOfFile : tokenOfVault;

async function callAPI({ refused }) {
  return get(setting('API_URL'), { Authorization: `Bearer ${await token({ refused })}` });
}

async function main() {
  const calls = Number(setting('CALLS', '1'));
  for (let call = 0; call < calls; call++) {
    if (call > 0) await sleep(Number(setting('INTERVAL', '1')) * 1000);
    let { status, body } = await callAPI({ refused: false });
    if (status === 401) {
      // The API may accept a newer token. Try only once: a second 401 has
      // another cause.
      ({ status, body } = await callAPI({ refused: true }));
    }
    if (status < 200 || status > 299) throw new Error(`the API returned ${status}: ${body}`);
    console.log(status, body);
  }
}

try {
  await main();
} catch (error) {
  console.error(`call-api: ${error.message}`);
  process.exitCode = 1;
}

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

// Checks a token before it is a header's value: an error of fetch about a
// malformed one would show it.
function bare(name, value) {
  if (!/^[!-~]+$/.test(value)) throw new Error(`${name} does not hold a bare token`);
  return value;
}

async function get(url, headers) {
  // A redirect could take the token to another host.
  const options = { headers, redirect: 'manual', signal: AbortSignal.timeout(30_000) };
  try {
    const response = await fetch(url, options);
    return { status: response.status, body: (await response.text()).trim() };
  } catch (error) {
    // fetch itself only says that it failed; why is in the cause.
    const why = error.cause?.message || error.cause?.code || error.message;
    throw new Error(`no answer from ${url}: ${why}`);
  }
}

// Reads the file at every call, since Vault Agent replaces it.
async function tokenOfFile() {
  return bare('TOKEN_FILE', (await readFile(setting('TOKEN_FILE'), 'utf8')).trim());
}

let cached;
let mintedAt;
let readAgain = 0;

// Reads from Vault, and keeps the token as long as Vault says.
async function tokenOfVault({ refused }) {
  const now = performance.now();
  if (cached && !refused && now < readAgain) return cached;

  const address = setting('VAULT_ADDR').replace(/\/$/, '');
  let url = `${address}/v1/${setting('MOUNT', 'mojoauth')}/creds/${setting('ROLE', 'demo')}`;
  // One that was minted later than the one that the API refused.
  if (refused) url += `?minted_after=${encodeURIComponent(mintedAt)}`;
  const headers = { 'X-Vault-Token': bare('VAULT_TOKEN', setting('VAULT_TOKEN')) };
  let { status, body } = await get(url, headers);
  if (status === 429 || status >= 500) {
    // The next request starts a plugin that was killed, and may find fewer
    // token requests waiting for their turn.
    await sleep(1000);
    ({ status, body } = await get(url, headers));
  }
  if (status !== 200) throw new Error(`Vault answered ${status}: ${errorText(body)}`);
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
    // It is not Vault's, but of something before it.
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
      // A newer token may be accepted. Once is enough: a second 401 is about
      // something else.
      ({ status, body } = await callAPI({ refused: true }));
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

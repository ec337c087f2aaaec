#!/bin/sh
# Copyright (c) The vault-plugin-secrets-mojoauth authors
# SPDX-License-Identifier: MPL-2.0
#
# Calls an API that MojoAuth protects, with an access token from Vault.
# See examples/README.md for the variables.
set -eu
LC_ALL=C
export LC_ALL
newline='
'

fail() {
	printf 'call-api: %s\n' "$*" >&2
	exit 1
}

# need_bare NAME VALUE: fails unless VALUE is one line of visible characters, as a
# header needs. The message names only the variable, since the value is secret.
need_bare() {
	case $2 in
	'' | *[![:graph:]]*) fail "$1 is not a bare token" ;;
	esac
}

# get URL HEADER: sets status and body. curl reads the header from standard input,
# because other users can see arguments in the process list.
get() {
	answer=$(printf '%s\n' "$2" | curl -sS --max-time 30 -H @- -w '\n%{http_code}' "$1") ||
		fail "no response from $1"
	status=${answer##*"$newline"}
	body=${answer%"$newline"*}
	body=${body%"$newline"}
}

# pick EXPRESSION: prints what sed finds in the body. Vault's JSON is on one line.
pick() { printf '%s\n' "$body" | sed -n "$1"; }

# read_vault [QUERY]: sets token, minted_at and read_again.
read_vault() {
	need_bare VAULT_TOKEN "${VAULT_TOKEN:-}"
	[ -n "${VAULT_ADDR:-}" ] || fail 'VAULT_ADDR is not set'
	url=${VAULT_ADDR%/}/v1/${MOUNT:-mojoauth}/creds/${ROLE:-demo}${1:-}
	now=$(date +%s)
	get "$url" "X-Vault-Token: $VAULT_TOKEN"
	case $status in
	429 | 5??)
		# Vault restarts a killed plugin at the next request. After a 429, fewer
		# token requests may be waiting by then.
		sleep 1
		get "$url" "X-Vault-Token: $VAULT_TOKEN"
		;;
	esac
	[ "$status" = 200 ] || fail "Vault returned $status: $(
		pick 's/^{"errors":\["\(.*\)"\].*/\1/; s/","/; /g; s/\\[nt]/ /g; s/\\"/"/g; s/\\\\/\\/g; p'
	)"
	# A bearer token consists of these characters only (RFC 6750 §2.1), and JSON
	# escapes none of them.
	token=$(pick 's|.*"access_token":"\([A-Za-z0-9._~+/=-]*\)".*|\1|p')
	minted_at=$(pick 's/.*"last_vault_rotation":"\([0-9TZ:-]*\)".*/\1/p')
	ttl=$(pick 's/.*"ttl":\([0-9][0-9]*\).*/\1/p')
	[ -n "$token" ] && [ -n "$ttl" ] || fail 'Vault returned no token'
	read_again=$((now + ttl))
}

# take_token [refused]: sets token, to a newer one if the API refused the last.
take_token() {
	if [ -n "${TOKEN_FILE:-}" ]; then
		# Read it every time, because Vault Agent replaces the file.
		token=$(cat "$TOKEN_FILE") || fail 'TOKEN_FILE cannot be read'
		need_bare TOKEN_FILE "$token"
	elif [ "${1:-}" = refused ]; then
		# A token that is newer than the refused one.
		read_vault "?minted_after=$minted_at"
	elif [ "$(date +%s)" -ge "$read_again" ]; then
		read_vault
	fi
}

[ -n "${API_URL:-}" ] || fail 'API_URL is not set'
token='' read_again=0 # nothing is cached yet
call=0
while [ "$call" -lt "${CALLS:-1}" ]; do
	[ "$call" -eq 0 ] || sleep "${INTERVAL:-1}"
	take_token
	get "$API_URL" "Authorization: Bearer $token"
	if [ "$status" = 401 ]; then
		# The API may accept a newer token. Try only once: a second 401 has
		# another cause.
		take_token refused
		get "$API_URL" "Authorization: Bearer $token"
	fi
	case $status in
	2??) printf '%s %s\n' "$status" "$body" ;;
	*) fail "the API returned $status: $body" ;;
	esac
	call=$((call + 1))
done

#!/bin/sh
# Runs the tests in e2e/consumers against OpenBao and then Vault, or against only the server
# that SERVER names.
#
#   SERVER=openbao scripts/consumers.sh [FLAG OF go test]... [PACKAGE]...
#
# The first run builds or installs the programs that the tests need into bin/consumers/.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)

say() { printf '==> %s\n' "$*"; }
die() { printf 'consumers.sh: %s\n' "$*" >&2; exit 1; }

case ${SERVER:-} in
openbao | vault) servers=$SERVER ;;
'') servers='openbao vault' ;;
*) die "SERVER is $SERVER: use openbao or vault" ;;
esac
if [ $# -eq 0 ]; then
	set -- ./...
	# Run the scripts here, where their progress messages are visible.
	for script in "$root"/scripts/consumers/*.sh; do
		"$script" >/dev/null || die "a consumer is not available: see above"
	done
fi

status=0
summary=
for server in $servers; do
	if [ "$server" = vault ]; then
		VAULT_BIN=$("$root/scripts/vault.sh") || die "no Vault to test with"
		export VAULT_BIN
	else
		BAO_BIN=$("$root/scripts/bao.sh") || die "no OpenBao to test with"
		export BAO_BIN
	fi
	say "Consumers of $server"
	started=$(date +%s)
	result=passed
	(cd "$root/e2e/consumers" && SERVER=$server go test -count=1 -timeout 30m -p 1 "$@") || { result=FAILED; status=1; }
	summary="$summary
==> The consumers' tests $result with $server after $(($(date +%s) - started)) seconds"
done
echo "$summary"
exit $status

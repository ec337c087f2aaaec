#!/bin/sh
# Runs Vault or OpenBao in dev mode with the engine, configures it and reads a token. The
# server runs until Ctrl-C.
#
# The script uses the vault that VAULT_BIN names, the one on PATH, one already built in
# bin/, or else OpenBao (scripts/bao.sh). Choose with SERVER=vault or SERVER=openbao. If
# neither is available, the script builds Vault from source.
#
# The OAuth server of the end-to-end tests stands in for MojoAuth, with an API that accepts
# its tokens. If MOJOAUTH_TOKEN_URL, MOJOAUTH_CLIENT_ID and MOJOAUTH_CLIENT_SECRET are set,
# the engine uses the real MojoAuth instead, with the audience MOJOAUTH_API_AUDIENCE and
# the scopes MOJOAUTH_SCOPES, if set.
#
# With AGENT=1, two Agents run too: one keeps a token in files, the other runs a program
# with the token in its environment and restarts it for each new token.
#
# Nothing is kept: storage is in memory.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
cd "$root"

say() { printf '==> %s\n' "$*"; }
die() { printf 'dev.sh: %s\n' "$*" >&2; exit 1; }

work=$(mktemp -d)
fetch_pid='' server_pid='' oauth_pid='' agent_pid='' supervisor_pid=''
cleanup() {
	trap - EXIT INT TERM
	for pid in $fetch_pid $supervisor_pid $agent_pid $server_pid $oauth_pid; do
		kill "$pid" 2>/dev/null || true
	done
	for pid in $fetch_pid $supervisor_pid $agent_pid $server_pid $oauth_pid; do
		wait "$pid" 2>/dev/null || true
	done
	rm -rf "$work"
}
trap cleanup EXIT
trap 'echo; say "Stopping"; exit 0' INT TERM

# until_ready WHAT PID LOG COMMAND...: waits until COMMAND succeeds, for a minute at most
# and only while the process runs.
until_ready() {
	what=$1 pid=$2 log=$3
	shift 3
	tries=0
	until "$@" >/dev/null 2>&1; do
		kill -0 "$pid" 2>/dev/null || die "$what exited: $(tail -n 5 "$log")"
		tries=$((tries + 1))
		[ $tries -lt 300 ] || die "$what is not ready after a minute: $(tail -n 5 "$log")"
		sleep 0.2
	done
}

# Fetches OpenBao, if needed, while the plugin compiles.
fetch() {
	scripts/bao.sh >"$work/fetched" &
	fetch_pid=$!
}
case ${SERVER:-} in
vault) ;;
openbao) fetch ;;
'') [ -n "${VAULT_BIN:-}" ] || scripts/vault.sh present >/dev/null || fetch ;;
*) die "SERVER is $SERVER: use vault or openbao" ;;
esac

say "Building the plugin (about 2 minutes the first time)"
mkdir -p "$work/plugins"
make --no-print-directory -s build VERSION="${VERSION:-0.1.0-dev}"
cp bin/vault-plugin-secrets-mojoauth "$work/plugins/"

if [ -n "${MOJOAUTH_TOKEN_URL:-}" ]; then
	: "${MOJOAUTH_CLIENT_ID:?set it, or unset MOJOAUTH_TOKEN_URL}" "${MOJOAUTH_CLIENT_SECRET:?set it, or unset MOJOAUTH_TOKEN_URL}"
	say "Using the real MojoAuth"
	token_url=$MOJOAUTH_TOKEN_URL client_id=$MOJOAUTH_CLIENT_ID client_secret=$MOJOAUTH_CLIENT_SECRET
	audience=${MOJOAUTH_API_AUDIENCE:-} scopes=${MOJOAUTH_SCOPES:-}
	narrow=${scopes%%[ ,]*}
	api=''
else
	say "Building the OAuth server (about 1 minute the first time)"
	# With the plugin's flags, what both need is compiled only once.
	(cd e2e && CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o ../bin/oauth-server ./cmd/oauth-server)
	client_id=demo-client
	client_secret=demo-$(od -An -N12 -tx1 /dev/urandom | tr -d ' \n')
	OAUTH_SERVER_CLIENT_SECRET=$client_secret bin/oauth-server -client-id "$client_id" >"$work/oauth.url" 2>"$work/oauth.log" &
	oauth_pid=$!
	until_ready "the OAuth server" "$oauth_pid" "$work/oauth.log" test -s "$work/oauth.url"
	oauth=$(cat "$work/oauth.url")
	until_ready "the OAuth server" "$oauth_pid" "$work/oauth.log" curl -sf "$oauth/healthz"
	token_url=$oauth/oauth2/token
	audience=https://api.example.org/ scopes=read:data,write:data narrow=read:data
	api=$oauth/data
fi

# The server's binary, and where it came from.
if [ -z "$fetch_pid" ]; then
	bin=$(scripts/vault.sh)
elif wait "$fetch_pid"; then
	bin=$(cat "$work/fetched")
elif [ "${SERVER:-}" = openbao ]; then
	die "no OpenBao to run"
else
	say "Neither Vault nor OpenBao is available: building Vault from source"
	bin=$(scripts/vault.sh)
fi
fetch_pid=''
version=$("$bin" version | awk '{ sub(/,$/, "", $2); print $1, $2; exit }') || die "$bin does not report a version"
case $version in
"OpenBao v"*) title=OpenBao program=bao made="fetched into bin/" other="Vault: make dev SERVER=vault" ;;
"Vault v"*) title=Vault program=vault made="built from source into bin/" other="OpenBao: make dev SERVER=openbao" ;;
*) die "$bin is neither Vault nor OpenBao: its version is $version" ;;
esac
case ${SERVER:-}$title in
vaultOpenBao) die "SERVER is vault, and VAULT_BIN is $version" ;;
openbaoVault) die "SERVER is openbao, and BAO_BIN is $version" ;;
esac
case $bin in
"${VAULT_BIN:-none}") origin="named by VAULT_BIN" ;;
"${BAO_BIN:-none}") origin="named by BAO_BIN" ;;
"$root/bin/"*) origin=$made ;;
*) origin="on your PATH at $bin" ;;
esac
say "Running $version, $origin; for $other"

# Makes the server's command available as users type it, even if it is not on PATH.
mkdir "$work/bin"
ln -s "$(CDPATH='' cd -- "$(dirname -- "$bin")" && pwd)/$(basename -- "$bin")" "$work/bin/$program"
path=''
[ "$(command -v "$program")" = "$bin" ] || path="PATH=\"$work/bin:\$PATH\""

port=${VAULT_DEV_PORT:-8200}
while curl -s -o /dev/null "http://127.0.0.1:$port/"; do
	port=$((port + 10))
done
# OpenBao's commands prefer BAO_ to VAULT_. The user's namespace does not exist in this
# server.
unset VAULT_NAMESPACE BAO_NAMESPACE
export VAULT_ADDR="http://127.0.0.1:$port"
VAULT_TOKEN=dev-$(od -An -N12 -tx1 /dev/urandom | tr -d ' \n')
export VAULT_TOKEN BAO_ADDR="$VAULT_ADDR" BAO_TOKEN="$VAULT_TOKEN"
server_log=$work/$program.log
say "Starting $title at $VAULT_ADDR"
printf 'plugin_directory = "%s/plugins"\n' "$work" >"$work/server.hcl"
# Pass the root token in the environment: other users can read arguments.
VAULT_DEV_ROOT_TOKEN_ID=$VAULT_TOKEN BAO_DEV_ROOT_TOKEN_ID=$VAULT_TOKEN \
	"$bin" server -dev -dev-no-store-token \
	-dev-listen-address="127.0.0.1:$port" -config="$work/server.hcl" >"$server_log" 2>&1 &
server_pid=$!
until_ready "$title" "$server_pid" "$server_log" "$bin" status

say "Registering and enabling the plugin"
sum=$(cd "$work/plugins" && { sha256sum ./* 2>/dev/null || shasum -a 256 ./*; })
VAULT_BIN=$bin scripts/register.sh "${sum%% *}" "$work/plugins/vault-plugin-secrets-mojoauth" mojoauth

say "Writing config and roles"
# Pass the secret on standard input: other users can read arguments.
printf '%s' "$client_secret" | "$bin" write mojoauth/config token_url="$token_url" client_id="$client_id" client_secret=-
"$bin" write mojoauth/roles/demo audience="$audience" scopes="$scopes"
"$bin" write mojoauth/roles/demo-narrow audience="$audience" scopes="$narrow"

say "Reading a token: $program read mojoauth/creds/demo"
"$bin" read mojoauth/creds/demo

if [ -n "$api" ]; then
	token=$("$bin" read -field=access_token mojoauth/creds/demo)
	say "Calling the protected API with it: curl -H \"Authorization: Bearer …\" $api"
	status=$(printf 'header = "Authorization: Bearer %s"\n' "$token" |
		curl -s -K - -o "$work/answer" -w '%{http_code}' "$api")
	printf '%s %s\n' "$status" "$(cat "$work/answer")"
	[ "$status" = 200 ] || die "the API did not accept the token"
fi

if [ "${AGENT:-}" = 1 ]; then
	say "Starting two $title Agents: one keeps a token in a file, the other supervises a program"
	"$bin" policy write demo - >/dev/null <<'HCL'
path "mojoauth/creds/demo" {
  capabilities = ["read"]
}
HCL
	"$bin" auth enable approle >/dev/null
	"$bin" write auth/approle/role/demo token_policies=demo >/dev/null
	"$bin" read -field=role_id auth/approle/role/demo/role-id >"$work/role-id"
	"$bin" write -f -field=secret_id auth/approle/role/demo/secret-id >"$work/secret-id"
	cat >"$work/login.hcl" <<HCL
vault {
  address = "$VAULT_ADDR"
}
auto_auth {
  method "approle" {
    config = {
      role_id_file_path                   = "$work/role-id"
      secret_id_file_path                 = "$work/secret-id"
      remove_secret_id_file_after_reading = false
    }
  }
}
HCL
	cat >"$work/agent.hcl" <<HCL
template {
  contents    = "{{ with secret \"mojoauth/creds/demo\" }}{{ .Data.access_token }}{{ end }}"
  destination = "$work/token"
  perms       = "0600"
}
template {
  contents    = "{{ with secret \"mojoauth/creds/demo\" }}Authorization: Bearer {{ .Data.access_token }}\n{{ end }}"
  destination = "$work/header"
  perms       = "0600"
}
HCL
	# A real program would call the API with the token; this one only logs its start.
	cat >"$work/program" <<'SH'
echo "$(date +%T) started with a token of ${#MOJOAUTH_TOKEN} characters" >>"$1"
exec sleep 86400
SH
	cat >"$work/supervisor.hcl" <<HCL
env_template "MOJOAUTH_TOKEN" {
  contents = "{{ with secret \"mojoauth/creds/demo\" }}{{ .Data.access_token }}{{ end }}"
}
exec {
  command                   = ["/bin/sh", "$work/program", "$work/supervised.log"]
  restart_on_secret_changes = "always"
  restart_stop_signal       = "SIGTERM"
}
HCL
	env -u VAULT_TOKEN -u BAO_TOKEN "$bin" agent -config="$work/login.hcl" -config="$work/agent.hcl" >"$work/agent.log" 2>&1 &
	agent_pid=$!
	env -u VAULT_TOKEN -u BAO_TOKEN "$bin" agent -config="$work/login.hcl" -config="$work/supervisor.hcl" >"$work/supervisor.log" 2>&1 &
	supervisor_pid=$!
	until_ready "the supervising agent" "$supervisor_pid" "$work/supervisor.log" test -s "$work/supervised.log"
	until_ready "the agent" "$agent_pid" "$work/agent.log" test -s "$work/header"
	if [ -n "$api" ]; then
		printf '%s with the header that the agent wrote to %s/header\n' "$(curl -s -o /dev/null -w '%{http_code}' -H @"$work/header" "$api")" "$work"
	fi
fi

# Only commands are indented. They have no comments, which some interactive shells do not
# accept.
cat <<TXT

$title is running. In another terminal:

  export VAULT_ADDR=$VAULT_ADDR VAULT_TOKEN=$VAULT_TOKEN
TXT
[ "$program" != bao ] || echo "  export BAO_ADDR=$BAO_ADDR BAO_TOKEN=$BAO_TOKEN"
[ -z "$path" ] || echo "  export $path"
cat <<TXT

Read the same token from the cache, read one with fewer scopes, and rotate the token:

  $program read mojoauth/creds/demo
  $program read -field=access_token mojoauth/creds/demo-narrow
  $program write -force mojoauth/rotate-role/demo

Read the config (without the client secret), the node's status and metrics, the help for
roles, and the server's log:

  $program read mojoauth/config
  $program read -format=json mojoauth/status
  curl -H "X-Vault-Token: \$VAULT_TOKEN" \$VAULT_ADDR/v1/mojoauth/metrics
  $program path-help mojoauth/roles/demo
  tail $server_log
TXT
[ -z "$api" ] || cat <<TXT

Call the API with the token; the programs in examples/ use API_URL too:

  export API_URL=$api
  curl -H "Authorization: Bearer \$($program read -field=access_token mojoauth/creds/demo)" \$API_URL

Simulate an outage of MojoAuth (see also docs/monitoring.md). The rotation fails with the
time of the next try, the read still returns the cached token, and status shows the
failure and the back-off:

  curl -X PUT $oauth/faults -d '{"status": 503}'
  $program write -force mojoauth/rotate-role/demo
  $program read mojoauth/creds/demo
  $program read -format=json mojoauth/status

End the outage:

  curl -X DELETE $oauth/faults
TXT
[ -z "$agent_pid" ] || cat <<TXT

One agent keeps $work/token and $work/header up to date; its log is $work/agent.log.
The other restarts a program for each new token; the program logs to $work/supervised.log.
TXT
echo
say "Press Ctrl-C to stop and remove everything"
wait "$server_pid" || die "$title exited: $(tail -n 5 "$server_log")"

#!/bin/sh
# Builds the commit that is checked out twice, in two clean clones, and compares the
# bytes.
#
#   scripts/reproducible.sh [binary | snapshot]
#
# binary, the default, is what `make build` makes for linux/amd64; snapshot is what
# `make release-snapshot` makes for all platforms: archives, their bills of materials
# and the sums.
#
# The clones differ in the length of their paths, the umask, the time zone, and the
# directory for temporary files. With FRESH_CACHE=1 the second has a build cache of its
# own, too, so that all is compiled again, and anything the compiler does not do in the
# same way twice shows. Without, Go takes what it compiled before, and links: that is
# a matter of seconds, and shows whether anything of the place gets into the files.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
cd "$root"

say() { printf '==> %s\n' "$*"; }
die() { printf 'reproducible.sh: %s\n' "$*" >&2; exit 1; }

what=${1:-binary}
case $what in binary | snapshot) ;; *) sed -n '2,17s/^# \{0,1\}//p' "$0" >&2; exit 2 ;; esac

work=$(mktemp -d)
# A build cache is read-only in places.
trap 'chmod -R u+w "$work"; rm -rf "$work"' EXIT

# build DIRECTORY: what DIRECTORY/clone made, as sums in DIRECTORY/sums.
build() (
	mkdir -p "$1/tmp"
	git clone -q --no-hardlinks "$root" "$1/clone"
	cd "$1/clone"
	export TMPDIR="$1/tmp"
	if [ "$what" = binary ]; then
		GOOS=linux GOARCH=amd64 make --no-print-directory -s build
		cd bin
		sha256sum vault-plugin-secrets-mojoauth >"$1/sums"
		return
	fi
	# goreleaser takes minutes to build, and is none of what is compared.
	mkdir -p bin
	cp "$root/bin/goreleaser" bin/
	make --no-print-directory -s release-snapshot GPG_FINGERPRINT= >"$1/log" 2>&1 || { cat "$1/log"; die "make release-snapshot failed"; }
	cd dist
	sha256sum -c --quiet -- *_SHA256SUMS
	sha256sum -- *.zip *.cdx.json *_SHA256SUMS >"$1/sums"
)

[ -z "$(git status --porcelain)" ] || say "There are changes that are not committed: the clones do not have them"
started=$(date +%s)
say "Building $(git rev-parse --short=12 HEAD) in one clone ($what)"
(umask 022 && TZ=UTC0 build "$work/1")
say "Building it in another, after $(($(date +%s) - started)) seconds"
second=$work/another-directory-with-a-longer-name/2
[ "${FRESH_CACHE:-}" != 1 ] || export GOCACHE="$work/cache"
(umask 077 && TZ=XYZ-13 build "$second")

if ! diff "$work/1/sums" "$second/sums"; then
	die "the two builds differ"
fi
cat "$work/1/sums"
say "Both builds made the same bytes; it took $(($(date +%s) - started)) seconds"

#!/bin/sh
# Builds the checked-out commit in two clean clones and compares the results byte by byte.
#
#   scripts/reproducible.sh [binary | snapshot]
#
# binary, the default, compares what `make build` builds for linux/amd64. snapshot compares
# what `make release-snapshot` builds for all platforms: archives, their bills of materials
# and the checksums.
#
# The clones differ in path length, umask, time zone and temporary directory. With
# FRESH_CACHE=1, the second build also has an empty build cache: everything is compiled
# again, which shows whether the compiler's output is deterministic. Without it, Go reuses
# compiled packages and only links. That takes seconds, and shows whether anything from the
# environment gets into the files.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
cd "$root"

say() { printf '==> %s\n' "$*"; }
die() { printf 'reproducible.sh: %s\n' "$*" >&2; exit 1; }

what=${1:-binary}
case $what in binary | snapshot) ;; *) sed -n '2,14s/^# \{0,1\}//p' "$0" >&2; exit 2 ;; esac

work=$(mktemp -d)
# A build cache is read-only in places.
trap 'chmod -R u+w "$work"; rm -rf "$work"' EXIT

# build DIRECTORY: builds in DIRECTORY/clone, and writes the checksums to DIRECTORY/sums.
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
	# goreleaser takes minutes to build, and is not compared.
	mkdir -p bin
	cp "$root/bin/goreleaser" bin/
	make --no-print-directory -s release-snapshot GPG_FINGERPRINT= >"$1/log" 2>&1 || { cat "$1/log"; die "make release-snapshot failed"; }
	cd dist
	sha256sum -c --quiet -- *_SHA256SUMS
	sha256sum -- *.zip *.cdx.json *_SHA256SUMS >"$1/sums"
)

[ -z "$(git status --porcelain)" ] || say "The clones do not include uncommitted changes"
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
say "Both builds are identical; this took $(($(date +%s) - started)) seconds"

#!/bin/sh
# Makes a release with goreleaser, as .goreleaser.yaml describes it. `make
# release-snapshot` and `make release` call it, after building the tools.
#
#   VERSION=0.1.0-dev scripts/release.sh snapshot
#   GITHUB_TOKEN=... GPG_FINGERPRINT=... scripts/release.sh publish
#   scripts/release.sh notes 0.1.0
#
# snapshot makes everything in dist/ and publishes nothing. publish does so for the
# tag that is checked out, vX.Y.Z, and uploads it as a draft. notes prints a version's
# part of CHANGELOG.md.
#
# GPG_FINGERPRINT is the key that signs the sums. A snapshot does without. What is
# published has to be signed with the key in release-key.asc, which users check it with.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
cd "$root"

say() { printf '==> %s\n' "$*"; }
die() { printf 'release.sh: %s\n' "$*" >&2; exit 1; }
usage() { sed -n '2,15s/^# \{0,1\}//p' "$0" >&2; exit 2; }

# notes VERSION: what is between "## VERSION" and the next "## ", without blank lines
# around it.
notes() {
	awk -v version="$1" '
		/^## / { found = $2 == version; next }
		found && (NF || text) { text = text $0 "\n" }
		END { sub(/\n+$/, "\n", text); printf "%s", text }' CHANGELOG.md
}

# goreleaser finds the sbom program on the PATH.
make_release() {
	started=$(date +%s)
	PATH=$root/bin:$PATH bin/goreleaser release --clean "$@"
	say "In dist/, after $(($(date +%s) - started)) seconds:"
	(cd dist && ls -- *.zip *.cdx.json *_SHA256SUMS*)
}

case ${1:-} in
notes)
	[ $# = 2 ] || usage
	notes "$2"
	;;
snapshot)
	[ $# = 1 ] || usage
	: "${VERSION:?is not set}"
	export VERSION
	if [ -n "$(git status --porcelain)" ]; then
		say "There are changes that are not committed: they are in this snapshot, too"
	fi
	if [ -n "${GPG_FINGERPRINT:-}" ]; then
		set -- --snapshot
	else
		say "No GPG_FINGERPRINT: the sums will not be signed"
		set -- --snapshot --skip=sign
	fi
	say "Making version $VERSION for 8 platforms: about 10 minutes on 2 cores, one when Go's build cache has it"
	make_release "$@"
	;;
publish)
	[ $# = 1 ] || usage
	tag=$(git describe --tags --exact-match 2>/dev/null) || die "no tag is checked out"
	version=${tag#v}
	[ "$tag" != "$version" ] || die "the tag is $tag, want v$tag"
	: "${GITHUB_TOKEN:?is not set}" "${GPG_FINGERPRINT:?is not set}"
	[ -f release-key.asc ] || die "release-key.asc is not there: users check the signature with it"
	gpg --batch --with-colons --show-keys release-key.asc | awk -F: '$1 == "fpr" { print $10 }' |
		grep -qx "$GPG_FINGERPRINT" || die "$GPG_FINGERPRINT is not the key in release-key.asc"
	mkdir -p bin
	notes "$version" >bin/release-notes.md
	[ -s bin/release-notes.md ] || die "CHANGELOG.md has no part \"## $version\""
	# goreleaser's own default; a snapshot's version comes from here.
	export VERSION="$version"
	say "Making $tag for 8 platforms and uploading it as a draft"
	make_release --release-notes=bin/release-notes.md
	;;
*) usage ;;
esac

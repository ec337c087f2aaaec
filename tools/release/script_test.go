// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package release

import (
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// project is a clone that is ready for a release: a commit on main with a tag, a
// changelog and a key.
type project struct {
	t           *testing.T
	dir, home   string
	fingerprint string
}

const (
	pluginName = "vault-plugin-secrets-mojoauth"
	version    = "1.2.3"
	tag        = "v" + version
	sumsFile   = "dist/" + pluginName + "_" + version + "_SHA256SUMS"
)

func newProject(t *testing.T) *project {
	t.Helper()
	for _, tool := range []string{"git", "gpg", "gpgv", "sha256sum"} {
		if _, err := exec.LookPath(tool); err != nil {
			if os.Getenv("CI") != "" {
				t.Fatalf("%s is not on PATH", tool)
			}
			t.Skipf("%s is not on PATH; not testing scripts/release.sh", tool)
		}
	}
	// A long path is too long for gpg's sockets.
	home, err := os.MkdirTemp("", "gpg")
	if err != nil {
		t.Fatal(err)
	}
	p := &project{t: t, dir: t.TempDir(), home: home}
	t.Cleanup(func() {
		p.must("gpgconf", "--kill", "all")
		if err := os.RemoveAll(home); err != nil {
			t.Error(err)
		}
	})
	script, err := os.ReadFile("../../scripts/release.sh")
	if err != nil {
		t.Fatal(err)
	}
	p.write("scripts/release.sh", string(script))
	if err := os.Chmod(filepath.Join(p.dir, "scripts/release.sh"), 0o700); err != nil {
		t.Fatal(err)
	}
	p.write(".gitignore", "/dist/\n/bin/\n")
	p.write("CHANGELOG.md", "# Changelog\n\n## 1.2.3 (January 2, 2027)\n\n* First.\n\n## 1.2.2\n\n* Older.\n")
	p.fingerprint = p.key("release")
	p.must("gpg", "--batch", "--armor", "--export", "--output", filepath.Join(p.dir, "release-key.asc"), p.fingerprint)
	p.must("git", "init", "-q", "-b", "main")
	p.commit("Release")
	p.must("git", "tag", "-a", "-m", "Version 1.2.3", tag)
	p.must("git", "update-ref", "refs/remotes/origin/main", "main")
	return p
}

func (p *project) write(name, content string) {
	p.t.Helper()
	file := filepath.Join(p.dir, name)
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		p.t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		p.t.Fatal(err)
	}
}

func (p *project) run(name string, args ...string) (string, error) {
	p.t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir = p.dir
	cmd.Env = append(os.Environ(), "GNUPGHOME="+p.home, "HOME="+p.home, "GITHUB_TOKEN=token", "GPG_FINGERPRINT="+p.fingerprint,
		"PATH="+filepath.Join(p.home, "bin")+":"+os.Getenv("PATH"),
		"GIT_AUTHOR_NAME=test", "GIT_AUTHOR_EMAIL=test@example.org", "GIT_COMMITTER_NAME=test", "GIT_COMMITTER_EMAIL=test@example.org")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (p *project) must(name string, args ...string) string {
	p.t.Helper()
	out, err := p.run(name, args...)
	if err != nil {
		p.t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return strings.TrimSpace(out)
}

func (p *project) commit(message string) {
	p.t.Helper()
	p.must("git", "add", "-A")
	p.must("git", "commit", "-q", "--no-gpg-sign", "--allow-empty", "-m", message)
}

// key creates a key and returns its fingerprint.
func (p *project) key(name string) string {
	p.t.Helper()
	p.must("gpg", "--batch", "--passphrase", "", "--quick-gen-key", name+" <"+name+"@example.org>", "ed25519", "sign", "1d")
	for _, line := range strings.Split(p.must("gpg", "--batch", "--with-colons", "--list-secret-keys", name+"@example.org"), "\n") {
		if fields := strings.Split(line, ":"); fields[0] == "fpr" {
			return fields[9]
		}
	}
	p.t.Fatal("gpg created no key")
	return ""
}

// built puts files into dist/ as a build does.
func (p *project) built() {
	p.t.Helper()
	var sums strings.Builder
	for _, file := range []string{pluginName + "_1.2.3_linux_amd64.zip", pluginName + "_1.2.3_linux_amd64.cdx.json"} {
		p.write("dist/"+file, file)
		fmt.Fprintf(&sums, "%x  %s\n", sha256.Sum256([]byte(file)), file)
	}
	p.write(sumsFile, sums.String())
}

// script runs scripts/release.sh, which must fail with the given text, or succeed if the
// text is empty.
func (p *project) script(text string, args ...string) string {
	p.t.Helper()
	out, err := p.run("scripts/release.sh", args...)
	switch {
	case text == "" && err != nil:
		p.t.Errorf("release.sh %v: %v\n%s", args, err, out)
	case text != "" && (err == nil || !strings.Contains(out, text)):
		p.t.Errorf("release.sh %v: got %v, want it to fail with %q\n%s", args, err, text, out)
	}
	return out
}

// Only a named tag that is checked out and on main can be released.
func TestOnlyATagOnMainIsReleased(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*project)
		args   []string
		text   string
	}{
		"valid":          {nil, []string{"check", tag}, ""},
		"no tag named":   {nil, []string{"check"}, "release.sh check v0.1.0"},
		"a branch":       {nil, []string{"check", "main"}, "want vX.Y.Z"},
		"a version":      {nil, []string{"check", version}, "want vX.Y.Z"},
		"an option":      {nil, []string{"check", "--all"}, "want vX.Y.Z"},
		"no such tag":    {nil, []string{"check", "v9.9.9"}, "there is no tag v9.9.9"},
		"another commit": {func(p *project) { p.commit("More") }, []string{"check", tag}, "is not checked out"},
		"a commit that is not on main": {func(p *project) {
			p.must("git", "checkout", "-q", "--detach")
			p.commit("Not reviewed")
			p.must("git", "tag", "-f", tag)
		}, []string{"check", tag}, "is not on origin/main"},
		"an older commit of main": {func(p *project) {
			p.commit("More")
			p.must("git", "update-ref", "refs/remotes/origin/main", "main")
			p.must("git", "checkout", "-q", tag)
		}, []string{"check", tag}, ""},
		"two tags": {func(p *project) { p.must("git", "tag", "v1.2.2") }, []string{"check", tag}, ""},
		"changes":  {func(p *project) { p.write("new", "x") }, []string{"check", tag}, "uncommitted changes"},
		"no notes": {func(p *project) { p.must("git", "tag", "v1.2.4") }, []string{"check", "v1.2.4"}, "CHANGELOG.md has no section"},
		"no key": {func(p *project) {
			p.must("git", "rm", "-q", "release-key.asc")
			p.commit("No key")
			p.must("git", "update-ref", "refs/remotes/origin/main", "main")
			p.must("git", "tag", "-f", tag)
		}, []string{"check", tag}, "release-key.asc is missing"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newProject(t)
			if c.change != nil {
				c.change(p)
			}
			p.script(c.text, c.args...)
			for _, step := range []string{"build", "sign", "publish"} {
				if c.args[0] == "check" && c.text != "" {
					p.script(strings.Replace(c.text, "release.sh check", "release.sh "+step, 1), append([]string{step}, c.args[1:]...)...)
				}
			}
		})
	}
}

// A release's signature covers exactly what was built, and is made with the key that
// users verify it with.
func TestOnlyBuiltFilesAreSigned(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*project)
		text   string
	}{
		"valid":   {func(*project) {}, ""},
		"changed": {func(p *project) { p.write("dist/"+pluginName+"_1.2.3_linux_amd64.zip", "x") }, "does not match"},
		"more":    {func(p *project) { p.write("dist/more.zip", "x") }, "has other files than"},
		"less": {func(p *project) {
			if err := os.Remove(filepath.Join(p.dir, "dist", pluginName+"_1.2.3_linux_amd64.cdx.json")); err != nil {
				p.t.Fatal(err)
			}
		}, "does not match"},
		"nothing":     {func(p *project) { p.must("rm", "-r", "dist") }, "run scripts/release.sh build"},
		"another key": {func(p *project) { p.fingerprint = p.key("other") }, "is not the key in release-key.asc"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newProject(t)
			p.built()
			c.change(p)
			p.script(c.text, "sign", tag)
			if _, err := os.Stat(filepath.Join(p.dir, sumsFile+".sig")); (err == nil) != (c.text == "") {
				t.Errorf("signature: %v", err)
			}
		})
	}
}

// A draft gets the signed files and the notes.
func TestOnlySignedFilesArePublished(t *testing.T) {
	p := newProject(t)
	// The fake gh logs its arguments and input, and publishes nothing.
	p.must("mkdir", filepath.Join(p.home, "bin"))
	gh := filepath.Join(p.home, "bin", "gh")
	if err := os.WriteFile(gh, []byte("#!/bin/sh\n{ printf '%s\\n' \"$@\"; cat; } >\"$HOME/gh.log\"\n"), 0o700); err != nil { //nolint:gosec // a program
		t.Fatal(err)
	}
	p.built()
	p.script("the checksums are not signed", "publish", tag)
	p.script("", "sign", tag)
	p.script("", "publish", tag)
	log, err := os.ReadFile(filepath.Join(p.home, "gh.log"))
	if err != nil {
		t.Fatal(err)
	}
	want := strings.Join([]string{
		"release", "create", tag, "--repo", "mojoauth/" + pluginName, "--draft", "--verify-tag", "--title", tag, "--notes-file", "-",
		"dist/" + pluginName + "_1.2.3_linux_amd64.zip", "dist/" + pluginName + "_1.2.3_linux_amd64.cdx.json", sumsFile, sumsFile + ".sig",
		"", "* First.", "",
	}, "\n")
	// The notes begin with a blank line if the changelog's section does.
	if got := string(log); strings.ReplaceAll(got, "\n\n", "\n") != strings.ReplaceAll(want, "\n\n", "\n") {
		t.Errorf("got the gh arguments\n%s\nwant\n%s", got, want)
	}

	p.write("dist/"+pluginName+"_1.2.3_linux_amd64.zip", "x")
	p.script("does not match", "publish", tag)
	p.built()
	other := p.key("other")
	p.must("rm", filepath.Join(p.dir, sumsFile+".sig"))
	p.must("gpg", "--batch", "--local-user", other, "--output", filepath.Join(p.dir, sumsFile+".sig"), "--detach-sign", filepath.Join(p.dir, sumsFile))
	p.script("not signed with the key", "publish", tag)
}

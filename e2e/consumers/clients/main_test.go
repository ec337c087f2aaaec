// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

// Package clients tests the example programs, with a Vault client library or with plain
// HTTP, against a real server with the engine.
package clients

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/consumers/scene"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
)

func TestMain(m *testing.M) {
	// The clients mostly wait, so more of them can run in parallel than there are CPUs.
	flag.Parse()
	if err := flag.Set("test.parallel", "4"); err != nil {
		panic(err)
	}
	os.Exit(scene.Main(m))
}

// client is a program that reads tokens. The fields describe how it differs from the other
// programs. All behave as examples/README.md describes.
type client struct {
	name    string // as in a row of examples/README.md
	command string // the row's last column, run in the project's directory
	needs   string // a program that must be on PATH

	// leased reports whether the client uses leases and needs a role with generate_lease.
	leased bool
	// tries is the number of requests that the client sends when Vault returns 429, 502 or
	// 504. alone is the number with VAULT_MAX_RETRIES=0. With a client library, more than one
	// would mean that the library itself retries.
	tries, alone int
	// waits reports whether the client honors the Retry-After of a 429.
	waits bool
	// redirects reports whether the client follows a standby's redirect to the active node.
	redirects bool
	// newer is the number of reads that the client needs to replace a refused token.
	newer int
	// dropsText reports whether the library drops the text of a 404.
	dropsText bool
	// statuses has the client's text for each status that it does not show as a number.
	statuses map[string]string
}

var clients = []*client{
	{name: "Go: vault/api", needs: "go", tries: 3, alone: 1, waits: true, redirects: true, newer: 1, dropsText: true},
	{name: "Go: vault-client-go", needs: "go", tries: 3, alone: 1, redirects: true, newer: 1},
	{
		name: "Python: hvac", needs: "python3", tries: 3, alone: 1, waits: true, redirects: true, newer: 1, dropsText: true,
		statuses: map[string]string{"400": "InvalidRequest", "429": "RateLimitExceeded", "502": "BadGateway", "504": "UnexpectedError"},
	},
	{name: "Node.js: node-vault", needs: "npm", tries: 3, alone: 1, redirects: true, newer: 1},
	{name: "Java: Spring Vault", needs: "mvn", tries: 3, alone: 1, redirects: true, newer: 1, dropsText: true},
	{name: "Java: Spring Vault's SecretLeaseContainer", needs: "mvn", leased: true, tries: 1, alone: 1, redirects: true, newer: 2, dropsText: true},
	{name: "Shell", needs: "curl", tries: 2, alone: 2, newer: 1},
	{name: "Go", needs: "go", tries: 2, alone: 2, newer: 1},
	{name: "Python", needs: "python3", tries: 2, alone: 2, newer: 1},
	{name: "Node.js", needs: "node", tries: 2, alone: 2, newer: 1},
}

// status returns the client's text for a status from Vault.
func (c *client) status(code string) string {
	if text, ok := c.statuses[code]; ok {
		return text
	}
	return code
}

// rows matches the table rows of examples/README.md that contain a program and its command,
// with or without a client library.
var rows = regexp.MustCompile("(?m)^\\| (?:([A-Za-z.]+: )\\[(.+)\\]\\(.+\\) [0-9.]+|\\[(.+)\\]\\(.+\\)) \\| .* \\| `(.+)` \\|$")

// available returns the clients whose tools are on PATH, with their commands.
func available(t testing.TB) (found []*client) {
	t.Helper()
	root, err := harness.Root()
	if err != nil {
		t.Fatal(err)
	}
	readme, err := os.ReadFile(filepath.Join(root, "examples", "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	commands := map[string]string{}
	for _, row := range rows.FindAllStringSubmatch(string(readme), -1) {
		commands[row[1]+row[2]+row[3]] = row[4]
	}
	delete(commands, "C#") // the end-to-end tests run it
	if len(commands) != len(clients) {
		t.Fatalf("examples/README.md has commands for %d programs, want %d: %q", len(commands), len(clients), commands)
	}
	for _, known := range clients {
		c := *known
		if c.command = commands[c.name]; c.command == "" {
			t.Fatalf("examples/README.md has no command for %s", c.name)
		}
		if _, err := exec.LookPath(c.needs); err == nil {
			found = append(found, &c)
		}
	}
	return found
}

// each runs a test for each client, some of them in parallel, and returns when all have
// ended.
func each(t *testing.T, name string, test func(t *testing.T, c *client)) {
	t.Helper()
	found := available(t)
	t.Run(name, func(t *testing.T) {
		for _, known := range clients {
			t.Run(known.name, func(t *testing.T) {
				i := slices.IndexFunc(found, func(c *client) bool { return c.name == known.name })
				if i < 0 {
					harness.Missing(t, "%s is not on PATH", known.needs)
				}
				t.Parallel()
				test(t, found[i])
			})
		}
	})
}

// program is a running client.
type program struct {
	t        testing.TB
	client   *client
	env      []string
	started  time.Time
	cmd      *exec.Cmd
	out      bytes.Buffer
	errs     bytes.Buffer
	timer    *time.Timer
	timedOut atomic.Bool // it took too long and was killed
}

// start starts a client with the given environment variables.
func (c *client) start(t testing.TB, env ...string) *program {
	t.Helper()
	root, err := harness.Root()
	if err != nil {
		t.Fatal(err)
	}
	// These programs are short-lived, so reduce Java's startup cost.
	command := strings.Replace(c.command, "java ", "java -XX:TieredStopAtLevel=1 -XX:+UseSerialGC ", 1)
	p := &program{t: t, client: c, env: env, started: time.Now(), cmd: exec.Command("sh", "-c", command)}
	p.cmd.Dir = root
	for _, variable := range os.Environ() {
		name, _, _ := strings.Cut(variable, "=")
		if !strings.HasPrefix(name, "VAULT_") && !strings.HasPrefix(name, "BAO_") {
			p.cmd.Env = append(p.cmd.Env, variable)
		}
	}
	p.cmd.Env = append(p.cmd.Env, "GOFLAGS=-mod=mod", "GOWORK=off")
	p.cmd.Env = append(p.cmd.Env, env...)
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.errs
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // lets the test kill the whole process group
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	group := -p.cmd.Process.Pid
	p.timer = time.AfterFunc(3*time.Minute, func() {
		p.timedOut.Store(true)
		_ = syscall.Kill(group, syscall.SIGKILL)
	})
	t.Cleanup(func() {
		if p.cmd.ProcessState == nil { // the test ended early
			_ = syscall.Kill(group, syscall.SIGKILL)
			_ = p.cmd.Wait()
		}
		p.timer.Stop()
	})
	return p
}

// wait waits for the program to end and verifies that it printed no token.
func (p *program) wait() (stdout, stderr string, code int) {
	p.t.Helper()
	err := p.cmd.Wait()
	p.timer.Stop()
	if p.timedOut.Load() {
		p.t.Errorf("with %q: still running after 3 minutes", p.env)
	}
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		p.t.Fatalf("%s: %v", p.client.command, err)
	}
	all := p.out.String() + p.errs.String()
	// These are the prefixes of JWTs and of Vault and OpenBao tokens.
	if found := regexp.MustCompile(`eyJ\S{20}|hvs\.\S{8}|\bs\.\S{20}|` + scene.ClientSecret).FindString(all); found != "" {
		p.t.Errorf("with %q: the output contains a secret:\n%s", p.env, all)
	}
	return p.out.String(), p.errs.String(), p.cmd.ProcessState.ExitCode()
}

// hello is the output of a program for one call.
const hello = `200 {"message":"hello ` + scene.ClientID + `"}` + "\n"

// succeeds waits for the program to end and verifies that it made that many calls and
// printed nothing else.
func (p *program) succeeds(calls int) {
	p.t.Helper()
	if stdout, stderr, code := p.wait(); code != 0 || stdout != strings.Repeat(hello, calls) || stderr != "" {
		p.t.Errorf("with %q: got exit code %d, %d successful calls in %q, and errors %q; want %d calls",
			p.env, code, strings.Count(stdout, hello), stdout, stderr, calls)
	}
}

// fails waits for the program to end and verifies that it made no call and printed a
// one-line error that contains all parts.
func (p *program) fails(parts ...string) {
	p.t.Helper()
	stdout, stderr, code := p.wait()
	if code != 1 || stdout != "" {
		p.t.Errorf("with %q: got exit code %d and output %q, want 1 and none; errors: %s", p.env, code, stdout, stderr)
	}
	for _, part := range parts {
		if !strings.Contains(stderr, part) {
			p.t.Errorf("with %q: got the errors %q, want %q in them", p.env, stderr, part)
		}
	}
	if lines := strings.Count(stderr, "\n"); lines > 2 { // go run adds one line
		p.t.Errorf("with %q: got %d lines of errors, want a single message:\n%s", p.env, lines, stderr)
	}
}

// role returns the name of a client's role for a purpose.
func (c *client) role(purpose string) string {
	name := regexp.MustCompile(`[^a-z0-9]+`).ReplaceAllString(strings.ToLower(c.name), "-")
	return fmt.Sprintf("%s-%s", strings.Trim(name, "-"), purpose)
}

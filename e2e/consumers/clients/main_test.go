// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

// Package clients runs the example programs of each client library of Vault, and those
// that speak plain HTTP, against a real server with the engine.
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
	// The clients mostly wait, so there are more of them at once than processors.
	flag.Parse()
	if err := flag.Set("test.parallel", "4"); err != nil {
		panic(err)
	}
	os.Exit(scene.Main(m))
}

// client is a program that reads tokens, and how it differs from the others. All behave
// as examples/README.md says.
type client struct {
	name    string // as in a row of examples/README.md
	command string // the row's last column, run in the project's directory
	needs   string // has to be on PATH

	// leased is set if it reads leases, and so needs a role with generate_lease.
	leased bool
	// tries is how many times it asks a Vault that fails with 429, 502 or 504. alone is how
	// many times with VAULT_MAX_RETRIES=0: those beyond the first would be the library's own.
	tries, alone int
	// waits is set if it waits as long as a Retry-After says, with a 429.
	waits bool
	// redirects is set if it follows a redirect of a standby to the active node.
	redirects bool
	// newer is how many reads it takes to get a newer token than the API refused.
	newer int
	// dropsText is set if the library drops the text of a 404.
	dropsText bool
	// statuses are what it says for a status, where that is not the number.
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

// status is what the client says for a status of Vault.
func (c *client) status(code string) string {
	if text, ok := c.statuses[code]; ok {
		return text
	}
	return code
}

// rows are the programs in examples/README.md with their commands: those without a
// library, and those with one. C# is not among them: it is as the others without one, and
// the end-to-end tests run it.
var rows = regexp.MustCompile("(?m)^\\| (?:([A-Za-z.]+: )\\[(.+)\\]\\(.+\\) [0-9.]+|\\[(.+)\\]\\(.+\\)) \\| .* \\| `(.+)` \\|$")

// available are the clients whose tools are on this machine, with their commands.
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
	delete(commands, "C#")
	if len(commands) != len(clients) {
		t.Fatalf("examples/README.md has commands of %d programs, want %d: %q", len(commands), len(clients), commands)
	}
	for _, known := range clients {
		c := *known
		if c.command = commands[c.name]; c.command == "" {
			t.Fatalf("examples/README.md has no command of %s", c.name)
		}
		if _, err := exec.LookPath(c.needs); err == nil {
			found = append(found, &c)
		}
	}
	return found
}

// each runs a test for each client, some of them at once, and returns when all have ended.
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

// program is a client that runs.
type program struct {
	t       testing.TB
	client  *client
	env     []string
	started time.Time
	cmd     *exec.Cmd
	out     bytes.Buffer
	errs    bytes.Buffer
	timer   *time.Timer
	late    atomic.Bool // it was ended because it took too long
}

// start starts a client with these variables.
func (c *client) start(t testing.TB, env ...string) *program {
	t.Helper()
	root, err := harness.Root()
	if err != nil {
		t.Fatal(err)
	}
	// Whoever starts Java that often has it compile less.
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
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // the shell's children end with it
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	group := -p.cmd.Process.Pid
	p.timer = time.AfterFunc(3*time.Minute, func() {
		p.late.Store(true)
		_ = syscall.Kill(group, syscall.SIGKILL)
	})
	t.Cleanup(func() {
		if p.cmd.ProcessState == nil { // a test that ended early
			_ = syscall.Kill(group, syscall.SIGKILL)
			_ = p.cmd.Wait()
		}
		p.timer.Stop()
	})
	return p
}

// wait waits for the program's end, and checks that it printed no token.
func (p *program) wait() (stdout, stderr string, code int) {
	p.t.Helper()
	err := p.cmd.Wait()
	p.timer.Stop()
	if p.late.Load() {
		p.t.Errorf("with %q: still running after 3 minutes", p.env)
	}
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		p.t.Fatalf("%s: %v", p.client.command, err)
	}
	all := p.out.String() + p.errs.String()
	// Every JWT and every token of Vault and OpenBao begins so.
	if found := regexp.MustCompile(`eyJ\S{20}|hvs\.\S{8}|\bs\.\S{20}|` + scene.ClientSecret).FindString(all); found != "" {
		p.t.Errorf("with %q: there is a secret in what it printed:\n%s", p.env, all)
	}
	return p.out.String(), p.errs.String(), p.cmd.ProcessState.ExitCode()
}

// hello is what a program prints for a call.
const hello = `200 {"message":"hello ` + scene.ClientID + `"}` + "\n"

// succeeds waits for the program, which has to make that many calls and say nothing else.
func (p *program) succeeds(calls int) {
	p.t.Helper()
	if stdout, stderr, code := p.wait(); code != 0 || stdout != strings.Repeat(hello, calls) || stderr != "" {
		p.t.Errorf("with %q: got exit code %d, %d good calls in %q, and errors %q; want %d calls",
			p.env, code, strings.Count(stdout, hello), stdout, stderr, calls)
	}
}

// fails waits for the program, which has to make no call, and say these things in a line.
func (p *program) fails(parts ...string) {
	p.t.Helper()
	stdout, stderr, code := p.wait()
	if code != 1 || stdout != "" {
		p.t.Errorf("with %q: got exit code %d and output %q, want 1 and none; errors: %s", p.env, code, stdout, stderr)
	}
	for _, part := range parts {
		if !strings.Contains(stderr, part) {
			p.t.Errorf("with %q: got the errors %q, want them to hold %q", p.env, stderr, part)
		}
	}
	if lines := strings.Count(stderr, "\n"); lines > 2 { // go run adds one
		p.t.Errorf("with %q: got %d lines of errors, want a message:\n%s", p.env, lines, stderr)
	}
}

// role is the name of a client's role for a purpose.
func (c *client) role(purpose string) string {
	name := regexp.MustCompile(`[^a-z0-9]+`).ReplaceAllString(strings.ToLower(c.name), "-")
	return fmt.Sprintf("%s-%s", strings.Trim(name, "-"), purpose)
}

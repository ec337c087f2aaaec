// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package harness

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/hashicorp/vault/api"
)

// Vault is a running Vault server that keeps its storage in files, so that it
// outlives a seal.
type Vault struct {
	*api.Client // with the root token

	Binary    string
	Dir       string // everything the server writes is in here
	LogFile   string
	AuditFile string

	unsealKey string
	process   *process
	responses recorder
}

// recorder keeps the bodies of the responses that pass it.
type recorder struct {
	next   http.RoundTripper
	mu     sync.Mutex
	bodies bytes.Buffer
}

func (r *recorder) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := r.next.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	resp.Body = io.NopCloser(bytes.NewReader(body))
	r.mu.Lock()
	defer r.mu.Unlock()
	fmt.Fprintf(&r.bodies, "%s %s: %s\n", req.Method, req.URL.Path, body)
	return resp, nil
}

// Responses are the bodies of all responses that the server has given to the
// client of v.
func (v *Vault) Responses() string {
	v.responses.mu.Lock()
	defer v.responses.mu.Unlock()
	return v.responses.bodies.String()
}

// StartVault starts a Vault with an empty storage whose plugin directory is
// pluginDir.
func StartVault(t testing.TB, binary, pluginDir string) *Vault {
	t.Helper()
	v := startVault(t, binary, pluginDir, "trace")
	if err := v.Sys().EnableAuditWithOptions("file", &api.EnableAuditOptions{
		Type: "file", Options: map[string]string{"file_path": v.AuditFile},
	}); err != nil {
		t.Fatal(err)
	}
	return v
}

// StartQuietVault is StartVault without an audit and with the log of a Vault in
// production, for measuring.
func StartQuietVault(t testing.TB, binary, pluginDir string) *Vault {
	t.Helper()
	return startVault(t, binary, pluginDir, "info")
}

func startVault(t testing.TB, binary, pluginDir, logLevel string) *Vault {
	t.Helper()
	dir := t.TempDir()
	v := &Vault{
		Binary:    binary,
		Dir:       dir,
		LogFile:   filepath.Join(dir, "vault.log"),
		AuditFile: filepath.Join(dir, "audit.log"),
	}
	address := FreeAddress(t)
	config := fmt.Sprintf(`
storage "file" { path = %q }
listener "tcp" {
  address         = %q
  cluster_address = %q
  tls_disable     = true
}
api_addr         = "http://%[2]s"
plugin_directory = %[4]q
disable_mlock    = true
log_level        = %[5]q
`, filepath.Join(dir, "storage"), address, FreeAddress(t), pluginDir, logLevel)
	configFile := filepath.Join(dir, "vault.hcl")
	if err := os.WriteFile(configFile, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(v.LogFile)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { log.Close() })
	cmd := exec.Command(binary, "server", "-config", configFile)
	cmd.Stdout, cmd.Stderr = log, log
	v.process = start(t, cmd)

	apiConfig := api.DefaultConfig()
	apiConfig.Address = "http://" + address
	apiConfig.MaxRetries = 0
	v.responses.next = apiConfig.HttpClient.Transport
	apiConfig.HttpClient.Transport = &v.responses
	v.Client, err = api.NewClient(apiConfig)
	if err != nil {
		t.Fatal(err)
	}
	Eventually(t, "Vault answers", func() error {
		select {
		case <-v.process.exited:
			return errors.New("it has exited: " + v.Log(t))
		default:
		}
		_, err := v.Sys().InitStatus()
		return err
	})
	keys, err := v.Sys().Init(&api.InitRequest{SecretShares: 1, SecretThreshold: 1})
	if err != nil {
		t.Fatal(err)
	}
	v.unsealKey = keys.KeysB64[0]
	v.SetToken(keys.RootToken)
	v.Unseal(t)
	return v
}

// Unseal unseals the Vault and waits until it serves.
func (v *Vault) Unseal(t testing.TB) {
	t.Helper()
	if _, err := v.Sys().Unseal(v.unsealKey); err != nil {
		t.Fatal(err)
	}
	Eventually(t, "Vault is active", func() error {
		health, err := v.Sys().Health()
		if err == nil && (health.Sealed || health.Standby) {
			err = fmt.Errorf("sealed %v, standby %v", health.Sealed, health.Standby)
		}
		return err
	})
}

// Register registers a plugin binary of the plugin directory in Vault's catalog
// as name, with that version.
func (v *Vault) Register(t testing.TB, pluginDir, binary, name, version string) {
	t.Helper()
	content, err := os.ReadFile(filepath.Join(pluginDir, binary))
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(content)
	if err := v.Sys().RegisterPlugin(&api.RegisterPluginInput{
		Name:    name,
		Type:    api.PluginTypeSecrets,
		Command: binary,
		SHA256:  hex.EncodeToString(sum[:]),
		Version: version,
	}); err != nil {
		t.Fatal(err)
	}
}

// Enable mounts a registered plugin at path.
func (v *Vault) Enable(t testing.TB, path, plugin, version string) {
	t.Helper()
	if err := v.Sys().Mount(path, &api.MountInput{Type: plugin, Config: api.MountConfigInput{PluginVersion: version}}); err != nil {
		t.Fatal(err)
	}
}

// CLI runs the vault command against this server with the root token.
func (v *Vault) CLI(ctx context.Context, args ...string) (string, error) {
	return run(ctx, []string{"VAULT_ADDR=" + v.Address(), "VAULT_TOKEN=" + v.Token()}, v.Binary, args...)
}

// Log is all that the server and its plugins have logged.
func (v *Vault) Log(t testing.TB) string {
	t.Helper()
	content, err := os.ReadFile(v.LogFile)
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

// PluginProcesses are the ids of the server's plugin processes that run this
// binary.
func (v *Vault) PluginProcesses(t testing.TB, binary string) []int {
	t.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	var pids []int
	for _, file := range stats {
		content, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		// pid (name) state ppid …; the name may hold anything but a further ).
		fields := strings.Fields(string(content[strings.LastIndexByte(string(content), ')')+1:]))
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if len(fields) < 2 || fields[1] != strconv.Itoa(v.process.cmd.Process.Pid) {
			continue
		}
		exe, err := os.Readlink(filepath.Join(filepath.Dir(file), "exe"))
		if err == nil && filepath.Base(exe) == binary {
			pids = append(pids, pid)
		}
	}
	return pids
}

// KillPlugin ends the plugin's process, or processes, by a signal: SIGKILL at once,
// SIGQUIT with a dump of all goroutines to Vault's log, as a crash leaves.
func (v *Vault) KillPlugin(t testing.TB, binary string, signal syscall.Signal) {
	t.Helper()
	pids := v.PluginProcesses(t, binary)
	if len(pids) == 0 {
		t.Fatalf("no process of %s is running", binary)
	}
	for _, pid := range pids {
		if err := syscall.Kill(pid, signal); err != nil {
			t.Fatal(err)
		}
	}
}

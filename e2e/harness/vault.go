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
	"time"

	"github.com/hashicorp/vault/api"
)

// Vault is a Vault or OpenBao server: a single one, whose storage survives a seal and the
// end of its process, or a node of a Cluster.
type Vault struct {
	*api.Client // with the root token

	Binary    string
	Product   Product
	Dir       string // has all files that the server writes
	LogFile   string
	AuditFile string

	address   string // with the scheme
	caFile    string // "" without TLS
	unsealKey string
	process   *process
	responses recorder
}

// recorder keeps the bodies of the responses that pass through it.
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

// Responses returns the bodies of all responses that the server sent to the client of v.
func (v *Vault) Responses() string {
	v.responses.mu.Lock()
	defer v.responses.mu.Unlock()
	return v.responses.bodies.String()
}

// StartVault starts a server with empty storage and the given plugin directory.
func StartVault(t testing.TB, binary, pluginDir string) *Vault {
	t.Helper()
	v := startVault(t, binary, pluginDir, "trace", true, "")
	if v.Product.Has(AuditInConfiguration) {
		return v
	}
	if err := v.Sys().EnableAuditWithOptions("file", &api.EnableAuditOptions{
		Type: "file", Options: map[string]string{"file_path": v.AuditFile},
	}); err != nil {
		t.Fatal(err)
	}
	return v
}

// StartQuietVault is StartVault without an audit and with a production log level, for
// measurements.
func StartQuietVault(t testing.TB, binary, pluginDir string) *Vault {
	t.Helper()
	return startVault(t, binary, pluginDir, "info", false, "")
}

// StartMeteredVault is StartQuietVault with server metrics, for BarrierOperations.
func StartMeteredVault(t testing.TB, binary, pluginDir string) *Vault {
	t.Helper()
	return startVault(t, binary, pluginDir, "info", false, "telemetry {\n  prometheus_retention_time = \"1h\"\n  disable_hostname = true\n}\n")
}

// startVault starts a single server. more is added to its configuration.
func startVault(t testing.TB, binary, pluginDir, logLevel string, audited bool, more string) *Vault {
	t.Helper()
	dir := t.TempDir()
	v := newVault(t, binary, dir, FreeAddress(t), nil)
	path := filepath.Join(dir, "storage")
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	stanzas := fmt.Sprintf("storage \"file\" {\n  path = %q\n}", path)
	if v.Product.Has(NoFileStorage) {
		mountDisk(t, path) // Raft waits for the disk at every write, which these tests are not about
		stanzas = raftStanza(path, "node", "", 1)
	}
	if audited && v.Product.Has(AuditInConfiguration) {
		stanzas += fmt.Sprintf("\naudit \"file\" \"file\" {\n  options {\n    file_path = %q\n  }\n}", v.AuditFile)
	}
	v.configure(t, more+stanzas, pluginDir, logLevel)
	v.Start(t)
	v.initialize(t)
	v.Unseal(t)
	return v
}

// raftStanza returns the stanza of integrated storage at a path, for a node that joins
// others with the join stanzas.
func raftStanza(path, node, join string, multiplier int) string {
	return fmt.Sprintf("storage \"raft\" {\n  path = %q\n  node_id = %q\n  performance_multiplier = %d\n%s}", path, node, multiplier, join)
}

// multiplier returns the lowest performance_multiplier with which nodes wait that long
// for the leader. Vault's documentation recommends 1 for production.
func (p Product) multiplier(patience time.Duration) int {
	unit := time.Second
	if p.Has(PatientNodes) {
		unit *= 3
	}
	return int((patience + unit - 1) / unit)
}

// newVault returns a server at the given address, with TLS if there is an authority for
// its certificate.
func newVault(t testing.TB, binary, dir, address string, ca *Authority) *Vault {
	t.Helper()
	product, _, err := ProductOf(binary)
	if err != nil {
		t.Fatal(err)
	}
	v := &Vault{
		Binary:    binary,
		Product:   product,
		Dir:       dir,
		LogFile:   filepath.Join(dir, "vault.log"),
		AuditFile: filepath.Join(dir, "audit.log"),
		address:   "http://" + address,
	}
	if ca != nil {
		ca.write(t, dir)
		v.address, v.caFile = "https://"+address, filepath.Join(dir, "ca.pem")
	}
	v.Client = v.newClient(t, func(transport http.RoundTripper) http.RoundTripper {
		v.responses.next = transport
		return &v.responses
	})
	return v
}

// newClient returns a client without a token that tries each request once.
func (v *Vault) newClient(t testing.TB, wrap func(http.RoundTripper) http.RoundTripper) *api.Client {
	t.Helper()
	config := api.DefaultConfig()
	config.Address = v.address
	config.MaxRetries = 0
	if v.caFile != "" {
		if err := config.ConfigureTLS(&api.TLSConfig{CACert: v.caFile}); err != nil {
			t.Fatal(err)
		}
	}
	config.HttpClient.Transport = wrap(config.HttpClient.Transport)
	client, err := api.NewClient(config)
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// Reader returns another client with the root token, whose responses are not kept. It
// waits at most timeout for a response.
func (v *Vault) Reader(t testing.TB, timeout time.Duration) *api.Client {
	t.Helper()
	client := v.newClient(t, func(transport http.RoundTripper) http.RoundTripper { return transport })
	client.SetToken(v.Token())
	client.SetClientTimeout(timeout)
	return client
}

// configure writes the server's configuration file with the given stanzas.
func (v *Vault) configure(t testing.TB, stanzas, pluginDir, logLevel string) {
	t.Helper()
	listener := "tls_disable = true"
	if v.caFile != "" {
		listener = fmt.Sprintf("tls_cert_file = %q\n  tls_key_file = %q", filepath.Join(v.Dir, "cert.pem"), filepath.Join(v.Dir, "key.pem"))
	}
	memory := "disable_mlock = true"
	if v.Product.Has(NoMemoryLock) {
		memory = ""
	}
	cluster := FreeAddress(t)
	config := fmt.Sprintf(`
%[1]s
listener "tcp" {
  address         = %[2]q
  cluster_address = %[3]q
  %[4]s
}
api_addr         = %[5]q
cluster_addr     = "https://%[3]s"
plugin_directory = %[6]q
log_level        = %[7]q
raw_storage_endpoint = true
%[8]s
`, stanzas, v.address[strings.LastIndex(v.address, "/")+1:], cluster, listener, v.address, pluginDir, logLevel, memory)
	if err := os.WriteFile(v.configFile(), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (v *Vault) configFile() string { return filepath.Join(v.Dir, "vault.hcl") }

// Start starts the server's process, and waits until it responds.
func (v *Vault) Start(t testing.TB) {
	t.Helper()
	log, err := os.OpenFile(v.LogFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close() // the process has its own
	cmd := exec.Command(v.Binary, "server", "-config", v.configFile())
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(os.Environ(), "TMPDIR="+v.Dir) // where a killed plugin leaves its socket
	v.process = start(t, cmd)
	Eventually(t, "Vault responds", func() error {
		if !v.Running() {
			return errors.New("the server has exited: " + v.Log(t))
		}
		_, err := v.Sys().SealStatus()
		return err
	})
}

// Running reports whether the server's process is running.
func (v *Vault) Running() bool {
	select {
	case <-v.process.exited:
		return false
	default:
		return true
	}
}

// Kill kills the server without a chance to notify anyone.
func (v *Vault) Kill(t testing.TB) {
	t.Helper()
	if err := v.process.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Fatal(err)
	}
	<-v.process.exited
}

// Stop stops the server as an operator does.
func (v *Vault) Stop() { v.process.stop() }

// initialize creates the keys of a new server, and logs in.
func (v *Vault) initialize(t testing.TB) {
	t.Helper()
	keys, err := v.Sys().Init(&api.InitRequest{SecretShares: 1, SecretThreshold: 1})
	if err != nil {
		t.Fatal(err)
	}
	v.unsealKey = keys.KeysB64[0]
	v.SetToken(keys.RootToken)
}

// Unseal unseals the server, and waits until it serves, itself or as a standby that knows
// the active node.
func (v *Vault) Unseal(t testing.TB) {
	t.Helper()
	// Only once: a node that is joining a cluster accepts the key and unseals later; a
	// second key would make it become a standby twice.
	Eventually(t, "Vault accepts the key", func() error { _, err := v.Sys().Unseal(v.unsealKey); return err })
	Eventually(t, "Vault is unsealed", func() error {
		if v.Sealed(t) {
			return errors.New("still sealed")
		}
		return nil
	})
	Eventually(t, "Vault serves", func() error {
		health, err := v.Sys().Health()
		if err != nil || !health.Sealed && !health.Standby {
			return err
		}
		leader, err := v.Sys().Leader()
		if err == nil && leader.LeaderAddress == "" {
			err = fmt.Errorf("sealed %v, standby %v, no active node", health.Sealed, health.Standby)
		}
		return err
	})
}

// Register registers a binary in the plugin directory in the server's catalog, with the
// given name and version.
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

// CLI runs the server's command against this server with the root token.
func (v *Vault) CLI(ctx context.Context, args ...string) (string, error) {
	return run(ctx, v.Environment(), v.Binary, args...)
}

// Environment returns the variables that direct the server's command to this server with
// the root token, and the project's scripts to its binary.
func (v *Vault) Environment() []string {
	variables := []string{"ADDR=" + v.address, "CACERT=" + v.caFile, "TOKEN=" + v.Token()}
	environment := []string{"VAULT_BIN=" + v.Binary}
	for _, variable := range variables {
		environment = append(environment, "VAULT_"+variable)
		if v.Product.Has(VariablesOfItsOwn) {
			environment = append(environment, "BAO_"+variable)
		}
	}
	return environment
}

// Log returns everything that the server and its plugins have logged.
func (v *Vault) Log(t testing.TB) string {
	t.Helper()
	content, err := os.ReadFile(v.LogFile)
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

// PluginProcesses returns the IDs of the server's plugin processes that run the given
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
			continue // it has exited
		}
		// pid (name) state ppid …; the name may contain anything except another ).
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

// SignalPlugin sends a signal to the plugin's processes. SIGKILL ends them immediately;
// SIGQUIT makes them write all goroutines to Vault's log, like a crash.
func (v *Vault) SignalPlugin(t testing.TB, binary string, signal syscall.Signal) {
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

// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package kubernetes

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"gopkg.in/yaml.v3"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
)

// programs has the paths that scripts/consumers/kubernetes.sh prints.
type programs struct {
	etcd, apiServer, externalSecrets string
	definitions                      string // the directory of the operator's CRDs
}

// findPrograms builds the programs if necessary and returns their paths. The first build
// takes minutes.
func findPrograms() (p programs, err error) {
	root, err := harness.Root()
	if err != nil {
		return p, err
	}
	cmd := exec.Command(filepath.Join(root, "scripts", "consumers", "kubernetes.sh"))
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return p, fmt.Errorf("scripts/consumers/kubernetes.sh: %w", err)
	}
	paths := strings.Fields(string(out))
	if len(paths) != 4 {
		return p, fmt.Errorf("scripts/consumers/kubernetes.sh printed %q, want four paths", out)
	}
	return programs{paths[0], paths[1], paths[2], paths[3]}, nil
}

// cluster is the control plane of a Kubernetes cluster: etcd and an API server. It has no
// nodes to run pods and no controllers.
type cluster struct {
	testing.TB
	url        string
	authority  string // the CA certificate of the API server, in PEM
	token      string // an administrator's token
	kubeconfig string // for the administrator
	dir        string
	client     *http.Client
	plurals    map[string]string // resource paths by apiVersion and kind
}

// newCluster starts a control plane that stops when the test ends.
func newCluster(t testing.TB) *cluster {
	t.Helper()
	authority := harness.NewAuthority(t)
	address := harness.FreeAddress(t)
	c := &cluster{
		TB:        t,
		url:       "https://" + address,
		authority: authority.PEM,
		token:     rand.Text(),
		dir:       t.TempDir(),
		plurals:   make(map[string]string),
	}
	c.kubeconfig = c.file("kubeconfig", fmt.Sprintf(`
apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: %q, certificate-authority: %q}}]
users: [{name: admin, user: {token: %q}}]
contexts: [{name: test, context: {cluster: test, user: admin}}]
current-context: test
`, c.url, c.file("ca.pem", authority.PEM), c.token))
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(authority.PEM))
	c.client = &http.Client{
		Timeout:   30 * time.Second,
		Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}},
	}
	t.Cleanup(c.client.CloseIdleConnections)

	etcd := "http://" + harness.FreeAddress(t)
	peers := "http://" + harness.FreeAddress(t)
	c.run("etcd", nil, tools.etcd,
		"--data-dir="+filepath.Join(c.dir, "etcd"), "--unsafe-no-fsync", "--log-level=warn",
		"--listen-client-urls="+etcd, "--advertise-client-urls="+etcd,
		"--listen-peer-urls="+peers, "--initial-advertise-peer-urls="+peers, "--initial-cluster=default="+peers)

	issued := authority.Issue(t, "127.0.0.1", time.Now().Add(24*time.Hour))
	signing, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	accounts := c.file("accounts.pem", pemOf(t, signing))
	host, port, _ := strings.Cut(address, ":")
	log := c.run("kube-apiserver", nil, tools.apiServer,
		"--etcd-servers="+etcd, "--bind-address="+host, "--advertise-address="+host, "--secure-port="+port,
		"--tls-cert-file="+c.file("server.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: issued.Certificate[0]}))),
		"--tls-private-key-file="+c.file("server-key.pem", pemOf(t, issued.PrivateKey)),
		"--cert-dir="+c.dir,
		"--authorization-mode=RBAC",
		"--token-auth-file="+c.file("tokens.csv", c.token+",admin,admin,system:masters\n"),
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file="+accounts, "--service-account-signing-key-file="+accounts,
		"--service-cluster-ip-range=10.0.0.0/24",
		"--endpoint-reconciler-type=none", // there is no endpoint to publish
	)
	harness.Eventually(t, "the API server is ready", func() error {
		status, body, err := c.do(http.MethodGet, "/readyz", "", nil)
		if err == nil && status != http.StatusOK {
			err = fmt.Errorf("%d %s", status, body)
		}
		if err == nil {
			// The server creates the namespace after it is ready.
			err = c.get("/api/v1/namespaces/default", nil)
		}
		if err != nil {
			return fmt.Errorf("%w; the end of its log:\n%s", err, tail(log))
		}
		return nil
	})
	return c
}

// pemOf returns a private key in PEM.
func pemOf(t testing.TB, key any) string {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

// file writes a file to the cluster's directory and returns its path.
func (c *cluster) file(name, content string) string {
	c.Helper()
	path := filepath.Join(c.dir, name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		c.Fatal(err)
	}
	return path
}

// run starts a program that stops when the test ends, and returns the path of its log. If
// the test fails, it prints the end of the log. The program's environment has no variables
// that configure Vault, OpenBao, or Kubernetes clients, except those in environment.
func (c *cluster) run(name string, environment []string, program string, args ...string) string {
	c.Helper()
	path := c.file(name+".log", "")
	log, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		c.Fatal(err)
	}
	defer log.Close() // the process has its own descriptor
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr, cmd.Dir = log, log, c.dir
	for _, variable := range os.Environ() {
		if !strings.HasPrefix(variable, "VAULT_") && !strings.HasPrefix(variable, "BAO_") && !strings.HasPrefix(variable, "KUBE") {
			cmd.Env = append(cmd.Env, variable)
		}
	}
	cmd.Env = append(cmd.Env, environment...)
	endWithParent(cmd)
	if err := cmd.Start(); err != nil {
		c.Fatal(err)
	}
	exited := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(exited)
	}()
	c.Cleanup(func() {
		select {
		case <-exited:
			c.Errorf("%s ended before the test did: %s", name, cmd.ProcessState)
		default:
		}
		end := tail(path) // read before the program logs its shutdown
		_ = cmd.Process.Signal(os.Interrupt)
		select {
		case <-exited:
		case <-time.After(10 * time.Second):
			_ = cmd.Process.Kill()
			<-exited
		}
		if c.Failed() {
			c.Logf("the end of the log of %s:\n%s", name, end)
		}
	})
	return path
}

// tail returns the end of a file.
func tail(path string) string {
	content, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	return string(content[max(0, len(content)-8<<10):])
}

// do sends a request to the API server as an administrator.
func (c *cluster) do(method, path, contentType string, body []byte) (status int, answer []byte, err error) {
	req, err := http.NewRequest(method, c.url+path, bytes.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set("Authorization", "Bearer "+c.token)
	req.Header.Set("Accept", "application/json")
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := c.client.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	answer, err = io.ReadAll(resp.Body)
	return resp.StatusCode, answer, err
}

// request sends a request and returns an error if it fails. It decodes the response into
// the value that into points to, unless into is nil.
func (c *cluster) request(method, path, contentType string, body []byte, into any) error {
	status, answer, err := c.do(method, path, contentType, body)
	if err != nil {
		return err
	}
	if status < 200 || status > 299 {
		return fmt.Errorf("%s %s: %d: %s", method, path, status, answer)
	}
	if into == nil {
		return nil
	}
	return json.Unmarshal(answer, into)
}

// get reads an object.
func (c *cluster) get(path string, into any) error {
	return c.request(http.MethodGet, path, "", nil, into)
}

// manifest is a Kubernetes object, decoded from YAML.
type manifest map[string]any

// manifestsIn decodes the documents in a YAML text. A duplicate key is an error.
func manifestsIn(text string) (all []manifest, err error) {
	decoder := yaml.NewDecoder(strings.NewReader(text))
	for {
		var m map[string]any
		switch err := decoder.Decode(&m); {
		case err == io.EOF:
			return all, nil
		case err != nil:
			return nil, err
		case len(m) > 0:
			all = append(all, m)
		}
	}
}

func (m manifest) kind() string { return m.text("kind") }
func (m manifest) name() string { return m.text("metadata", "name") }

// text returns the string at a path of keys, or "".
func (m manifest) text(keys ...string) string {
	s, _ := m.at(keys...).(string)
	return s
}

// at returns the value at a path of keys, or nil.
func (m manifest) at(keys ...string) any {
	var value any = map[string]any(m)
	for _, key := range keys {
		object, _ := value.(map[string]any)
		value = object[key]
	}
	return value
}

// object returns the object at a path of keys, or nil.
func (m manifest) object(keys ...string) manifest {
	object, _ := m.at(keys...).(map[string]any)
	return object
}

// set replaces the value at a path of keys, which must exist.
func (m manifest) set(t testing.TB, value any, keys ...string) {
	t.Helper()
	last := len(keys) - 1
	object := m.object(keys[:last]...)
	if object[keys[last]] == nil {
		t.Fatalf("the %s %s has no %s", m.kind(), m.name(), strings.Join(keys, "."))
	}
	object[keys[last]] = value
}

// apply applies manifests with server-side apply. A field that the server doesn't know is an
// error.
func (c *cluster) apply(manifests ...manifest) {
	c.Helper()
	for _, m := range manifests {
		if err := c.tryApply(m, ""); err != nil {
			c.Fatalf("applying the %s %s: %v", m.kind(), m.name(), err)
		}
	}
}

// tryApply applies a manifest with additional query parameters, such as &dryRun=All.
func (c *cluster) tryApply(m manifest, query string) error {
	path, err := c.pathOf(m)
	if err != nil {
		return err
	}
	body, err := yaml.Marshal(m)
	if err != nil {
		return err
	}
	return c.request(http.MethodPatch, path+"?fieldManager=test&force=true&fieldValidation=Strict"+query,
		"application/apply-patch+yaml", body, nil)
}

// pathOf returns the API path of an object. A namespaced object is in the namespace
// default.
func (c *cluster) pathOf(m manifest) (string, error) {
	version := m.text("apiVersion")
	base := "/apis/" + version
	if !strings.Contains(version, "/") {
		base = "/api/" + version
	}
	key := version + " " + m.kind()
	if c.plurals[key] == "" {
		var list struct {
			Resources []struct {
				Name, Kind string
				Namespaced bool
			}
		}
		if err := c.get(base, &list); err != nil {
			return "", err
		}
		for _, r := range list.Resources {
			if r.Kind != m.kind() || strings.Contains(r.Name, "/") {
				continue
			}
			c.plurals[key] = r.Name
			if r.Namespaced {
				c.plurals[key] = "namespaces/default/" + r.Name
			}
		}
		if c.plurals[key] == "" {
			return "", fmt.Errorf("the API server has no resource %s", key)
		}
	}
	return base + "/" + c.plurals[key] + "/" + m.name(), nil
}

// define applies the custom resource definitions in a directory and waits until the API
// server serves them.
func (c *cluster) define(dir string) {
	c.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.yaml"))
	if err != nil || len(files) == 0 {
		c.Fatalf("found no custom resource definitions in %s: %v", dir, err)
	}
	var definitions []manifest
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			c.Fatal(err)
		}
		in, err := manifestsIn(string(content))
		if err != nil {
			c.Fatalf("%s: %v", file, err)
		}
		definitions = append(definitions, in...)
	}
	c.apply(definitions...)
	for _, definition := range definitions {
		path, err := c.pathOf(definition)
		if err != nil {
			c.Fatal(err)
		}
		harness.Eventually(c, definition.name()+" is served", func() error {
			var d struct {
				Status struct {
					Conditions []struct{ Type, Status string }
				}
			}
			if err := c.get(path, &d); err != nil {
				return err
			}
			for _, condition := range d.Status.Conditions {
				if condition.Type == "Established" && condition.Status == "True" {
					return nil
				}
			}
			return fmt.Errorf("got the conditions %v", d.Status.Conditions)
		})
	}
}

// serviceAccount creates a service account and returns a token for it. The token is for the
// given audiences, or for the API server if there are none.
func (c *cluster) serviceAccount(name string, audiences ...string) string {
	c.Helper()
	c.apply(manifest{"apiVersion": "v1", "kind": "ServiceAccount", "metadata": map[string]any{"name": name}})
	body, err := json.Marshal(map[string]any{
		"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
		"spec": map[string]any{"audiences": audiences, "expirationSeconds": 3600},
	})
	if err != nil {
		c.Fatal(err)
	}
	var answer struct{ Status struct{ Token string } }
	if err := c.request(http.MethodPost, "/api/v1/namespaces/default/serviceaccounts/"+name+"/token", "application/json", body, &answer); err != nil {
		c.Fatalf("creating a token for the service account %s: %v", name, err)
	}
	return answer.Status.Token
}

// secret is a Kubernetes Secret.
type secret struct {
	Metadata struct{ ResourceVersion string }
	Data     map[string][]byte
}

func (c *cluster) secret(name string) (secret, error) {
	var s secret
	err := c.get("/api/v1/namespaces/default/secrets/"+name, &s)
	return s, err
}

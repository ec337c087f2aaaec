// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package kubernetes

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/consumers/scene"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/oauthserver"
)

const (
	lifetime  = 40 * time.Second
	lifetimes = 5
	floor     = lifetime / 10

	outage   = lifetime / 3     // how long the OAuth server is down
	sealed   = 10 * time.Second // how long Vault is sealed
	interval = time.Second

	// longest is the largest effective min_ttl.
	longest = lifetime * 8 / 10
)

// documentedMinTTL returns the min_ttl that docs/consumers.md recommends.
func documentedMinTTL(interval, outage time.Duration) time.Duration {
	return (interval + 2*outage + floor).Round(time.Second)
}

// operation is an External Secrets Operator that writes the engine's tokens to a cluster.
type operation struct {
	*scene.Scene
	*cluster
	docs documentation
}

// startOperator starts a scene, a control plane, and the operator. Vault's Kubernetes auth
// method validates logins with the API server.
func startOperator(t *testing.T) *operation {
	t.Helper()
	if minTTL := documentedMinTTL(interval, outage); minTTL > longest {
		t.Fatalf("min_ttl is %s, but values above %s have no effect", minTTL, longest)
	}
	o := &operation{
		Scene:   scene.New(t, lifetime, nil),
		cluster: newCluster(t),
		docs:    documented(t, "External Secrets Operator"),
	}
	o.define(tools.definitions)

	reviewer := o.serviceAccount("vault")
	o.apply(manifest{
		"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
		"metadata": map[string]any{"name": "vault-reviews-tokens"},
		"roleRef":  map[string]any{"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:auth-delegator"},
		"subjects": []any{map[string]any{"kind": "ServiceAccount", "name": "vault", "namespace": "default"}},
	})
	o.vault(o.docs.command("vault", "auth", "enable", "kubernetes"))
	config := o.docs.command("vault", "write", "auth/kubernetes/config")
	for i, word := range config {
		if strings.HasPrefix(word, "kubernetes_host=") {
			config[i] = "kubernetes_host=" + o.url
		}
	}
	o.vault(append(config, "kubernetes_ca_cert="+o.authority, "token_reviewer_jwt="+reviewer))

	o.run("external-secrets", []string{"KUBECONFIG=" + o.kubeconfig}, tools.externalSecrets,
		"--metrics-addr=0", "--live-addr="+harness.FreeAddress(t), "--concurrent=4")
	return o
}

// tb returns the test. The scene and the cluster both embed it.
func (o *operation) tb() testing.TB { return o.Scene.TB }

// vault runs a documented vault command with the CLI of the tested server.
func (o *operation) vault(command []string) {
	o.tb().Helper()
	if _, err := o.Vault.CLI(o.tb().Context(), command[1:]...); err != nil {
		o.tb().Fatal(err)
	}
}

// application sets up an application that reads the role with its name. It creates a service
// account, a policy, and the Kubernetes auth role from docs/consumers.md with the given token
// type.
func (o *operation) application(name, tokenType string) {
	o.tb().Helper()
	o.serviceAccount(name)
	o.Policy(name, fmt.Sprintf("path \"mojoauth/creds/%s\" {\n  capabilities = [\"read\"]\n}", name))
	var command []string
	for _, word := range o.docs.command("vault", "write", "auth/kubernetes/role/reports") {
		if strings.HasPrefix(word, "token_type=") {
			word = "token_type=" + tokenType
		}
		command = append(command, strings.ReplaceAll(word, "reports", name))
	}
	o.vault(command)
}

// generator returns the documented generator and ExternalSecret for an application.
func (o *operation) generator(name string, interval time.Duration) (generator, external manifest) {
	t := o.tb()
	t.Helper()
	generator = o.docs.manifest("VaultDynamicSecret", "reports")
	generator.set(t, name, "metadata", "name")
	generator.set(t, "/mojoauth/creds/"+name, "spec", "path")
	generator.set(t, o.Vault.Address(), "spec", "provider", "server")
	generator.set(t, name, "spec", "provider", "auth", "kubernetes", "role")
	generator.set(t, name, "spec", "provider", "auth", "kubernetes", "serviceAccountRef", "name")
	external = o.docs.manifest("ExternalSecret", "reports")
	external.set(t, name, "metadata", "name")
	external.set(t, interval.String(), "spec", "refreshInterval")
	external.set(t, name, "spec", "target", "name")
	source := external.at("spec", "dataFrom").([]any)[0].(map[string]any)
	manifest(source).set(t, name, "sourceRef", "generatorRef", "name")
	return generator, external
}

// generate applies the documented generator and ExternalSecret for an application.
func (o *operation) generate(name string, interval time.Duration) {
	o.tb().Helper()
	generator, external := o.generator(name, interval)
	o.apply(generator, external)
}

// reader is an application that reads its token from a Secret before every call.
type reader struct {
	name     string
	calls    int
	refused  int
	tokens   []string // distinct, in order
	versions []string // of the Secret, distinct, in order
}

// call reads the Secret and calls the API with its token.
func (o *operation) call(r *reader) error {
	s, err := o.secret(r.name)
	if err != nil {
		return err
	}
	token := string(s.Data["access_token"])
	if !slices.Contains(r.tokens, token) {
		r.tokens = append(r.tokens, token)
	}
	if !slices.Contains(r.versions, s.Metadata.ResourceVersion) {
		r.versions = append(r.versions, s.Metadata.ResourceVersion)
	}
	status, err := o.CallAPI(token)
	if err != nil {
		return err
	}
	r.calls++
	if status != http.StatusOK {
		r.refused++
	}
	return nil
}

// readUntil calls the API as the reader five times a second until stop is closed.
func (o *operation) readUntil(stop <-chan struct{}, r *reader) {
	tick := time.NewTicker(time.Second / 5)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return
		case <-tick.C:
		}
		before := r.refused
		if err := o.call(r); err != nil {
			o.tb().Errorf("%s: %v", r.name, err)
			return
		}
		if r.refused > before && before == 0 {
			o.tb().Logf("%s: the API refused a token at %s", r.name, time.Now().Format(time.TimeOnly))
		}
	}
}

// left returns the time left until a JWT expires.
func left(t testing.TB, token string) time.Duration {
	t.Helper()
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		t.Fatalf("%q is not a JWT", token)
	}
	var claims struct{ Exp int64 }
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err == nil {
		err = json.Unmarshal(payload, &claims)
	}
	if err != nil {
		t.Fatal(err)
	}
	return time.Until(time.Unix(claims.Exp, 0))
}

// vaultTokens returns the number of tokens in the server's storage by the Kubernetes auth
// role that issued them, or "" for other tokens. Batch tokens aren't stored.
func (o *operation) vaultTokens() map[string]int {
	t := o.tb()
	t.Helper()
	counts := make(map[string]int)
	list, err := o.Vault.Logical().List("auth/token/accessors")
	if err != nil || list == nil {
		t.Fatalf("listing accessors: %v, %v", list, err)
	}
	for _, accessor := range list.Data["keys"].([]any) {
		token, err := o.Vault.Auth().Token().LookupAccessor(accessor.(string))
		var answer *api.ResponseError
		if errors.As(err, &answer) && answer.StatusCode < 500 {
			continue // revoked since the list
		}
		if err != nil {
			t.Fatal(err)
		}
		meta, _ := token.Data["meta"].(map[string]any)
		role, _ := meta["role"].(string)
		counts[role]++
	}
	return counts
}

// requests returns the number of responses by request path, from the server's audit log.
func (o *operation) requests() map[string]int {
	t := o.tb()
	t.Helper()
	audit, err := os.ReadFile(o.Vault.AuditFile)
	if err != nil {
		t.Fatal(err)
	}
	counts := make(map[string]int)
	for line := range bytes.Lines(audit[:bytes.LastIndexByte(audit, '\n')+1]) {
		var entry struct {
			Type    string
			Request struct{ Path string }
		}
		if err := json.Unmarshal(line, &entry); err != nil {
			t.Fatal(err)
		}
		if entry.Type == "response" {
			counts[entry.Request.Path]++
		}
	}
	return counts
}

// The documented ExternalSecret and generator keep a Secret fresh with the documented
// min_ttl. In five lifetimes with an outage of the OAuth server, a rotation, and a sealed
// Vault, the API refuses no call. The test also runs a SecretStore and setups that
// docs/consumers.md advises against.
func TestExternalSecretsOperator(t *testing.T) {
	o := startOperator(t)
	minTTL := documentedMinTTL(interval, outage).String()

	// reports follows the document.
	o.Role("reports", map[string]any{"min_ttl": minTTL})
	o.application("reports", "batch")
	o.generate("reports", interval)

	// hasty has an interval below R − m and no min_ttl.
	o.Role("hasty", nil)
	o.application("hasty", "batch")
	o.generate("hasty", 5*time.Second)

	// whole keeps all keys of the response, and each of its logins leaves a token.
	o.Role("whole", map[string]any{"min_ttl": minTTL})
	o.application("whole", "service")
	generator, external := o.generator("whole", 2*interval)
	delete(external.object("spec", "target"), "template")
	o.apply(generator, external)

	// stored uses a SecretStore. Each login leaves a token unless the operator revokes it.
	o.Role("stored", map[string]any{"min_ttl": minTTL})
	o.application("stored", "service")
	store, external := o.docs.manifest("SecretStore", "mojoauth"), o.docs.manifest("ExternalSecret", "reports-from-store")
	store.set(t, o.Vault.Address(), "spec", "provider", "vault", "server")
	store.set(t, "stored", "spec", "provider", "vault", "auth", "kubernetes", "role")
	store.set(t, "stored", "spec", "provider", "vault", "auth", "kubernetes", "serviceAccountRef", "name")
	external.set(t, interval.String(), "spec", "refreshInterval")
	external.set(t, "stored", "spec", "target", "name")
	manifest(external.at("spec", "data").([]any)[0].(map[string]any)).set(t, "creds/stored", "remoteRef", "key")
	o.apply(store, external)

	// query has a query in the path.
	generator, external = o.generator("query", time.Hour)
	generator.set(t, "/mojoauth/creds/reports?scopes="+oauthserver.DataScope, "spec", "path")
	generator.set(t, "reports", "spec", "provider", "auth", "kubernetes", "role")
	generator.set(t, "reports", "spec", "provider", "auth", "kubernetes", "serviceAccountRef", "name")
	o.apply(generator, external)

	var readers []*reader
	for _, name := range []string{"reports", "hasty", "whole", "stored"} {
		r := &reader{name: name}
		readers = append(readers, r)
		harness.EventuallyWithin(t, 2*time.Minute, name+" has a token", func() error { return o.call(r) })
		*r = reader{name: name}
	}
	reports, hasty, whole, stored := readers[0], readers[1], readers[2], readers[3]

	stop := make(chan struct{})
	var wg sync.WaitGroup
	began := time.Now()
	before, tokensBefore := o.requests(), o.vaultTokens()
	mintsBefore := len(o.OAuth.Issued())
	for _, r := range readers {
		wg.Go(func() { o.readUntil(stop, r) })
	}
	at := func(lifetimes float64, what string) {
		time.Sleep(time.Until(began.Add(time.Duration(lifetimes * float64(lifetime)))))
		t.Logf("%s: %s", time.Now().Format(time.TimeOnly), what)
	}

	at(0.5, "waiting until hasty's token is almost due")
	due := lifetime/4 + lifetime/20 // a node renews a token a little before R
	harness.EventuallyWithin(t, 2*lifetime, "hasty's token is almost due", func() error {
		s, err := o.secret("hasty")
		if err != nil {
			return err
		}
		if l := left(t, string(s.Data["access_token"])); l < due || l > due+time.Second {
			return fmt.Errorf("it has %s left", l)
		}
		return nil
	})
	t.Logf("%s: the OAuth server fails for %s", time.Now().Format(time.TimeOnly), outage)
	o.OAuth.SetFaults(oauthserver.Faults{Status: http.StatusServiceUnavailable})
	time.Sleep(outage)
	o.OAuth.SetFaults(oauthserver.Faults{})

	at(2.9, "rotating")
	o.Write("rotate-role/reports", nil)

	at(3.3, "sealing for "+sealed.String())
	if err := o.Vault.Sys().Seal(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(sealed)
	o.Vault.Unseal(t)
	t.Logf("%s: unsealed", time.Now().Format(time.TimeOnly))

	at(lifetimes, "done")
	close(stop)
	wg.Wait()

	after := o.requests()
	mints := len(o.OAuth.Issued()) - mintsBefore
	seen := 0
	for _, r := range readers {
		path := "mojoauth/creds/" + r.name
		t.Logf("%s: %d calls of the API, %d refused; %d reads of Vault, %d tokens, %d versions of the Secret",
			r.name, r.calls, r.refused, after[path]-before[path], len(r.tokens), len(r.versions))
		if r.calls < lifetimes*int(lifetime.Seconds())*2 {
			t.Errorf("%s: got only %d calls, want at least two per second", r.name, r.calls)
		}
		seen += len(r.tokens)
	}
	t.Logf("%d logins of all four applications, %d mints, %d tokens in the Secrets", after["auth/kubernetes/login"]-before["auth/kubernetes/login"], mints, seen)

	for _, r := range []*reader{reports, stored, whole} {
		if r.refused > 0 {
			t.Errorf("%s: the API refused %d of %d calls", r.name, r.refused, r.calls)
		}
	}
	if hasty.refused == 0 {
		t.Error("hasty: the API refused no call: the outage was too short to test the other applications")
	}
	for _, r := range []*reader{reports, hasty, stored} {
		if len(r.versions) != len(r.tokens) {
			t.Errorf("%s: %d versions of the Secret for %d tokens, want one for each", r.name, len(r.versions), len(r.tokens))
		}
	}
	if len(whole.versions) < 2*len(whole.tokens) {
		t.Errorf("whole: %d versions of the Secret for %d tokens, want at least twice as many: docs/consumers.md says that ttl changes the Secret",
			len(whole.versions), len(whole.tokens))
	}
	if minimum := lifetimes * int(lifetime/(lifetime-longest)) / 2; len(reports.tokens) < minimum {
		t.Errorf("reports: %d tokens in %d lifetimes, want at least %d", len(reports.tokens), lifetimes, minimum)
	}

	// stored may leave two tokens: one from the login just before the server was sealed, and
	// one from a login in progress.
	tokens := o.vaultTokens()
	t.Logf("tokens in Vault's storage by role: %v, previously %v", tokens, tokensBefore)
	if tokens["reports"] != 0 || tokens["hasty"] != 0 {
		t.Errorf("the generators' logins left %d tokens, want none", tokens["reports"]+tokens["hasty"])
	}
	if tokens["stored"] > 2 {
		t.Errorf("the store's logins left %d tokens, want at most 2", tokens["stored"])
	}
	if tokens["whole"] < lifetimes*int(lifetime/(2*interval))/2 {
		t.Errorf("whole left only %d tokens: docs/consumers.md says that the operator does not revoke them", tokens["whole"])
	}

	t.Run("query in the path is escaped", func(t *testing.T) {
		var external struct {
			Status struct {
				Conditions []struct{ Type, Status, Message string }
			}
		}
		if err := o.get("/apis/external-secrets.io/v1/namespaces/default/externalsecrets/query", &external); err != nil {
			t.Fatal(err)
		}
		if c := external.Status.Conditions; len(c) != 1 || c[0].Status != "False" {
			t.Errorf("got the conditions %v, want not ready", c)
		}
		if s, err := o.secret("query"); err == nil {
			t.Errorf("got a Secret with the version %s, want none", s.Metadata.ResourceVersion)
		}
		escaped := 0
		for path, n := range after {
			if strings.HasPrefix(path, "mojoauth/creds/reports?") {
				escaped += n
			}
		}
		if escaped == 0 {
			t.Error("got no request for a path that contains the query")
		}
	})
}

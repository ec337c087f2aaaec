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

	outage   = lifetime / 3 // of the OAuth server
	sealed   = 10 * time.Second
	interval = time.Second

	// longest is the largest min_ttl that has an effect.
	longest = lifetime * 8 / 10
)

// documentedMinTTL is how docs/consumers.md says to choose min_ttl.
func documentedMinTTL(interval, outage time.Duration) time.Duration {
	return (interval + 2*outage + floor).Round(time.Second)
}

// operation is an External Secrets Operator that brings an engine's tokens into a cluster.
type operation struct {
	*scene.Scene
	*cluster
	docs documentation
}

// startOperator starts a scene, a control plane and the operator. Vault's Kubernetes auth
// method asks the API server about the service accounts that log in.
func startOperator(t *testing.T) *operation {
	t.Helper()
	if minTTL := documentedMinTTL(interval, outage); minTTL > longest {
		t.Fatalf("min_ttl would be %s, and more than %s has no effect", minTTL, longest)
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

// tb is the test, which the scene and the cluster both have.
func (o *operation) tb() testing.TB { return o.Scene.TB }

// vault runs a command of Vault's or OpenBao's, as the document has it.
func (o *operation) vault(command []string) {
	o.tb().Helper()
	if _, err := o.Vault.CLI(o.tb().Context(), command[1:]...); err != nil {
		o.tb().Fatal(err)
	}
}

// application makes what an application needs that reads the role of its name: a service
// account, a policy, and the role of the Kubernetes auth method that docs/consumers.md
// shows, with that type of tokens.
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

// generator is the documented generator and ExternalSecret of an application.
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

// generate applies the documented generator and ExternalSecret of an application.
func (o *operation) generate(name string, interval time.Duration) {
	o.tb().Helper()
	generator, external := o.generator(name, interval)
	o.apply(generator, external)
}

// reader is an application that takes its token from a Secret for every call.
type reader struct {
	name     string
	calls    int
	refused  int
	tokens   []string // distinct, in order
	versions []string // of the Secret, distinct, in order
}

// call reads the Secret and calls the API with the token in it.
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

// readUntil has the reader call the API several times a second until stop is closed.
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
			o.tb().Logf("%s: the API refuses a token at %s", r.name, time.Now().Format(time.TimeOnly))
		}
	}
}

// left is how long a JWT is still valid.
func left(t testing.TB, token string) time.Duration {
	t.Helper()
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		t.Fatalf("%q is no JWT", token)
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

// vaultTokens counts the tokens in the server's storage by the role of the Kubernetes auth
// method that they come from, "" for all others. Batch tokens aren't stored.
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
			continue // revoked meanwhile
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

// requests counts the server's answers by the path of the request, from its audit log.
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

// The ExternalSecret and the generator that docs/consumers.md shows keep a Secret fresh,
// with min_ttl as the document says to choose it: no call of the API is refused in five
// lifetimes, with an outage of the OAuth server, a rotation, and a sealed Vault. Beside
// them run what the document advises against, and a SecretStore.
func TestExternalSecretsOperator(t *testing.T) {
	o := startOperator(t)
	minTTL := documentedMinTTL(interval, outage).String()

	// As documented.
	o.Role("reports", map[string]any{"min_ttl": minTTL})
	o.application("reports", "batch")
	o.generate("reports", interval)

	// With an interval below R − m, and without min_ttl.
	o.Role("hasty", nil)
	o.application("hasty", "batch")
	o.generate("hasty", 5*time.Second)

	// With all keys of the answer, and logins that leave a token each.
	o.Role("whole", map[string]any{"min_ttl": minTTL})
	o.application("whole", "service")
	generator, external := o.generator("whole", 2*interval)
	delete(external.object("spec", "target"), "template")
	o.apply(generator, external)

	// A store, with logins that leave a token each, unless they are revoked.
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

	// With a query in the path.
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

	at(0.5, "the OAuth server will fail when hasty's token is about to be due")
	due := lifetime/4 + lifetime/20 // a node renews a token a little before R
	harness.EventuallyWithin(t, 2*lifetime, "hasty's token is about to be due", func() error {
		s, err := o.secret("hasty")
		if err != nil {
			return err
		}
		if l := left(t, string(s.Data["access_token"])); l < due || l > due+time.Second {
			return fmt.Errorf("it is valid for %s", l)
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
			t.Errorf("%s: only %d calls: the test did not look closely", r.name, r.calls)
		}
		seen += len(r.tokens)
	}
	t.Logf("%d logins of all four, %d mints, %d tokens in the Secrets", after["auth/kubernetes/login"]-before["auth/kubernetes/login"], mints, seen)

	for _, r := range []*reader{reports, stored, whole} {
		if r.refused > 0 {
			t.Errorf("%s: the API refused %d of %d calls", r.name, r.refused, r.calls)
		}
	}
	if hasty.refused == 0 {
		t.Error("hasty: the API refused no call: the outage was none, and showed nothing of the others")
	}
	for _, r := range []*reader{reports, hasty, stored} {
		if len(r.versions) != len(r.tokens) {
			t.Errorf("%s: %d versions of the Secret for %d tokens, want one for each", r.name, len(r.versions), len(r.tokens))
		}
	}
	if len(whole.versions) < 2*len(whole.tokens) {
		t.Errorf("whole: %d versions of the Secret for %d tokens: ttl does not count any more, and the document says it does",
			len(whole.versions), len(whole.tokens))
	}
	if minimum := lifetimes * int(lifetime/(lifetime-longest)) / 2; len(reports.tokens) < minimum {
		t.Errorf("reports: %d tokens in %d lifetimes, want at least %d", len(reports.tokens), lifetimes, minimum)
	}

	// A token of stored may be left: from the login just before the server was sealed, and
	// from the one that is under way.
	tokens := o.vaultTokens()
	t.Logf("tokens in Vault's storage by role: %v, and %v before", tokens, tokensBefore)
	if tokens["reports"] != 0 || tokens["hasty"] != 0 {
		t.Errorf("the generators' logins left %d tokens, want none", tokens["reports"]+tokens["hasty"])
	}
	if tokens["stored"] > 2 {
		t.Errorf("the store's logins left %d tokens", tokens["stored"])
	}
	if tokens["whole"] < lifetimes*int(lifetime/(2*interval))/2 {
		t.Errorf("whole left %d tokens: the operator revokes its logins, and the document says it does not", tokens["whole"])
	}

	t.Run("a query in the path is no query", func(t *testing.T) {
		var external struct {
			Status struct {
				Conditions []struct{ Type, Status, Message string }
			}
		}
		if err := o.get("/apis/external-secrets.io/v1/namespaces/default/externalsecrets/query", &external); err != nil {
			t.Fatal(err)
		}
		if c := external.Status.Conditions; len(c) != 1 || c[0].Status != "False" {
			t.Errorf("the conditions are %v, want it not to be ready", c)
		}
		if s, err := o.secret("query"); err == nil {
			t.Errorf("there is a Secret with the version %s", s.Metadata.ResourceVersion)
		}
		asked := 0
		for path, n := range after {
			if strings.HasPrefix(path, "mojoauth/creds/reports?") {
				asked += n
			}
		}
		if asked == 0 {
			t.Error("no request was for a path with the query in it")
		}
	})
}

// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/oauthserver"
)

// Attacks by someone who runs the token endpoint, may write a config without knowing its
// secret, may write a role, or may read one.

// timed runs do, which must stop when its context does, and returns how long that took.
// It cancels the context after half a minute, more than anything here may take.
func timed(do func(ctx context.Context) error) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	began := time.Now()
	err := do(ctx)
	return time.Since(began), err
}

// serveTLS starts an OAuth server with a certificate for a host.
func serveTLS(t testing.TB, ca *harness.Authority, host string) *oauthserver.Server {
	t.Helper()
	server, err := oauthserver.New(time.Hour, demoClient(clientID, canary))
	if err != nil {
		t.Fatal(err)
	}
	if err := server.StartTLS("127.0.0.1:0", ca.Issue(t, host, time.Now().Add(time.Hour))); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	return server
}

// Someone who may write a config but does not know its secret must not be able to obtain
// it: neither with a host that looks like the config's, nor with a certificate authority
// of their own for a host whose address they control.
func TestSecretGoesNowhereElseUnlessItIsSentAgain(t *testing.T) {
	router := startRouter(t)
	t.Setenv("HTTPS_PROXY", router.url)
	t.Setenv("NO_PROXY", "")
	public, own := harness.NewAuthority(t), harness.NewAuthority(t)
	genuine := serveTLS(t, public, "login.api.example")
	lookalike := serveTLS(t, public, "*.api.example") // a host that the attacker owns
	impostor := serveTLS(t, own, "login.api.example")
	router.route("login.api.example", genuine)
	router.route("", lookalike)

	w := newWorld(t)
	config := func(name string) string {
		t.Helper()
		before := len(genuine.Requests())
		w.write("config/"+name, w.config(map[string]any{"token_url": "https://login.api.example/oauth2/token", "ca_cert": public.PEM}))
		if got := len(genuine.Requests()) - before; got != 1 {
			t.Fatalf("the endpoint of a new config got %d requests, want only its verification", got)
		}
		return "mojoauth/config/" + name
	}
	for i, host := range []string{"log\u0130n.api.example", "log%C4%B0n.api.example", "login.api.example.", "xn--login-bgd.api.example"} {
		_, err := w.vault.Logical().Write(config(fmt.Sprintf("host%d", i)), map[string]any{"token_url": "https://" + host + "/oauth2/token"})
		w.wantError(err, 400, "token_url")
		if got := len(lookalike.Requests()); got != 0 {
			t.Errorf("%q, which looks like the config's host, received the secret", host)
			break
		}
	}
	alone, beside := config("alone"), config("beside")
	router.route("login.api.example", impostor)
	for path, bundle := range map[string]string{alone: own.PEM, beside: public.PEM + own.PEM} {
		_, err := w.vault.Logical().Write(path, map[string]any{"ca_cert": bundle})
		w.wantError(err, 400, "ca_cert", "client_secret")
	}
	if got := len(impostor.Requests()); got != 0 {
		t.Errorf("a server with a certificate from the attacker's authority received the secret %d times", got)
	}

	// Someone who knows the secret may do all this.
	before := len(impostor.Requests())
	w.write("config/alone", map[string]any{"ca_cert": own.PEM, "client_secret": canary})
	if got := len(impostor.Requests()) - before; got != 1 {
		t.Errorf("after the secret was sent again, the server got %d requests, want 1", got)
	}
}

// An endpoint can send anything on a connection that Go's client keeps for later. Go logs
// it, and Vault logs what the plugin logs.
func TestUnsolicitedDataIsNotLogged(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	endpoint, ended := blurting(t)
	w.write("config", w.config(map[string]any{"token_url": endpoint.tokenURL(), "verify_connection": false}))
	for i := range 3 {
		name := fmt.Sprintf("role%d", i)
		w.write("roles/"+name, nil)
		w.token(name)
		select {
		case <-ended:
		case <-time.After(time.Minute):
			t.Fatal("the connection is still open a minute after the endpoint sent unsolicited data")
		}
	}
	// Once a later entry is in the log, all earlier ones are as well.
	w.write("roles/marker", nil)
	w.token("marker")
	harness.Eventually(t, "a later mint is logged", func() error {
		if !strings.Contains(w.vault.Log(t), "role=marker") {
			return errors.New("not yet")
		}
		return nil
	})
	if log := w.vault.Log(t); strings.Contains(log, "Unsolicited response") || strings.Contains(log, "is what you sent me") {
		t.Error("the log has what the endpoint sent unsolicited")
	}
	w.noCanary()
}

// An operator may set GODEBUG for the plugin to debug something else. (Set for Vault, it
// makes Vault itself log what it sends to its plugins.)
func TestGoDebuggingLogsNoSecret(t *testing.T) {
	t.Parallel()
	vault := harness.StartVault(t, vaultBinary, pluginDir)
	content, err := os.ReadFile(filepath.Join(pluginDir, pluginBinary))
	if err != nil {
		t.Fatal(err)
	}
	if err := vault.Sys().RegisterPlugin(&api.RegisterPluginInput{
		Name: pluginName, Type: api.PluginTypeSecrets, Version: pluginVersion, Command: pluginBinary,
		SHA256: fmt.Sprintf("%x", sha256.Sum256(content)), Env: []string{"GODEBUG=http2debug=2"},
	}); err != nil {
		t.Fatal(err)
	}
	vault.Enable(t, "mojoauth", pluginName, pluginVersion)
	w := &world{TB: t, vault: vault, oauth: startOAuth(t)}

	ca := harness.NewAuthority(t)
	tokenURL := startHTTP2(t, ca, w.oauth)
	for _, method := range []string{"client_secret_post", "client_secret_basic"} {
		w.write("config/"+method, w.config(map[string]any{"token_url": tokenURL, "ca_cert": ca.PEM, "token_endpoint_auth_method": method}))
		w.write("roles/"+method, role(map[string]any{"config": method}))
		w.token(method)
	}
	harness.Eventually(t, "the mint is logged", func() error {
		if !strings.Contains(w.vault.Log(t), "role=client_secret_basic") {
			return errors.New("not yet")
		}
		return nil
	})
	log := w.vault.Log(t)
	basic := base64.StdEncoding.EncodeToString([]byte(clientID + ":" + canary))
	for _, secret := range append(w.oauth.Issued(), "grant_type=client_credentials", basic, canary) {
		if i := strings.Index(log, secret); i >= 0 {
			t.Errorf("%.40s… is in the log: …%s…", secret, log[max(0, i-120):i])
		}
	}
	w.noCanary()
}

// endpoints returns endpoints that never send a complete answer.
func endpoints(t testing.TB) map[string]*rawEndpoint {
	return map[string]*rawEndpoint{"101": switching(t), "drip": dripping(t), "silence": silent(t)}
}

// However slowly an endpoint answers, a read ends within request_timeout and a second
// (here 3 s); the additional second is for a slow machine.
func TestEndpointCannotDelayARead(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for name, endpoint := range endpoints(t) {
		w.write("config/"+name, w.config(map[string]any{"token_url": endpoint.tokenURL(), "verify_connection": false, "request_timeout": "2s"}))
		w.write("roles/"+name, role(map[string]any{"config": name}))
		took, err := timed(func(ctx context.Context) error {
			_, err := w.vault.Logical().ReadWithContext(ctx, "mojoauth/creds/"+name)
			return err
		})
		t.Logf("%s: the read took %s", name, took.Round(10*time.Millisecond))
		if took > 4*time.Second {
			t.Errorf("%s: the read took %s with a request_timeout of 2s, want at most 3s: %v", name, took, err)
			continue
		}
		status := 504
		if name == "101" {
			status = 502 // an answer, but not a token endpoint's
		}
		w.wantError(err, status, fmt.Sprintf("role %q", name))
		if endpoint.requests.Load() == 0 {
			t.Errorf("%s: the endpoint got no request: the test shows nothing", name)
		}

		// Nor does a write with verification take longer.
		took, err = timed(func(ctx context.Context) error {
			_, err := w.vault.Logical().WriteWithContext(ctx, "mojoauth/config/"+name, map[string]any{"max_retries": 1})
			return err
		})
		if took > 5*time.Second { // verifications are a second apart
			t.Errorf("%s: a write of the config took %s, want at most 3s: %v", name, took, err)
		}
		w.wantError(err, 400, "was not saved", "verify_connection=false")
	}
}

// Vault waits for requests to finish before it reloads, disables or seals, and serves no
// requests while it seals. Each takes at most request_timeout and 6 s, 8 s here. Two more
// seconds are for a slow machine.
func TestEndpointCannotDelayVault(t *testing.T) {
	t.Parallel()
	for name, do := range map[string]func(ctx context.Context, sys *api.Sys) error{
		"reload": func(ctx context.Context, sys *api.Sys) error {
			_, err := sys.ReloadPluginWithContext(ctx, &api.ReloadPluginInput{Mounts: []string{"mojoauth/"}})
			return err
		},
		"disable": func(ctx context.Context, sys *api.Sys) error { return sys.UnmountWithContext(ctx, "mojoauth") },
		"seal":    func(ctx context.Context, sys *api.Sys) error { return sys.SealWithContext(ctx) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			reader := w.vault.Reader(t, 2*time.Minute)
			var reading sync.WaitGroup
			defer reading.Wait()
			for name, endpoint := range endpoints(t) {
				w.write("config/"+name, w.config(map[string]any{"token_url": endpoint.tokenURL(), "verify_connection": false, "request_timeout": "2s"}))
				w.write("roles/"+name, role(map[string]any{"config": name}))
				reading.Go(func() { _, _ = reader.Logical().Read("mojoauth/creds/" + name) })
				harness.Eventually(t, "the mint is in progress", func() error {
					if endpoint.requests.Load() == 0 {
						return errors.New("not yet")
					}
					return nil
				})
			}
			took, err := timed(func(ctx context.Context) error { return do(ctx, w.vault.Sys()) })
			t.Logf("%s took %s", name, took.Round(10*time.Millisecond))
			if err != nil || took > 10*time.Second {
				t.Errorf("%s took %s and returned %v, with a request_timeout of 2s; want success within 8s", name, took, err)
			}
		})
	}
}

// If a server in front of MojoAuth refuses a role's request as too long, other roles are
// not affected.
func TestTooLongRequestBlocksNoOtherRole(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	firewall := startFirewall(t, w.oauth)
	w.write("config", w.config(map[string]any{"token_url": firewall.url}))
	w.write("roles/long", role(map[string]any{"extra_params": map[string]any{"pad": strings.Repeat("x", 3<<10)}}))
	for i := range 10 {
		_, err := w.vault.Logical().Read("mojoauth/creds/long")
		w.wantError(err, 400, `role "long"`, "HTTP 413")
		if err != nil && strings.Contains(err.Error(), "client_secret") {
			t.Errorf("the reader of a role with a request that is too long is advised to check the client secret: %v", err)
		}
		name := fmt.Sprintf("role%d", i)
		w.write("roles/"+name, role(nil))
		if _, err := w.vault.Logical().Read("mojoauth/creds/" + name); err != nil {
			t.Errorf("after a 413 for another role: %v", err)
			break
		}
	}
	if firewall.refused.Load() == 0 {
		t.Error("no request was refused: the test shows nothing")
	}
}

// A firewall refuses one role's audience without an OAuth error, and that role is read
// again and again. Within two back-offs the other roles get tokens, and are not affected
// from then on.
func TestForbiddenAudienceBlocksNoOtherRole(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	firewall := startFirewall(t, w.oauth)
	w.write("config", w.config(map[string]any{"token_url": firewall.url}))
	w.write("roles/forbidden", map[string]any{"audience": forbiddenAudience})
	const others = 20
	for i := range others {
		w.write(fmt.Sprintf("roles/role%d", i), role(nil))
	}
	_, err := w.vault.Logical().Read("mojoauth/creds/forbidden")
	w.wantError(err, 400, `role "forbidden"`, "HTTP 403")

	stop := make(chan struct{})
	var reading sync.WaitGroup
	reading.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond):
			}
			_, _ = w.vault.Logical().Read("mojoauth/creds/forbidden")
		}
	})
	defer reading.Wait()
	defer close(stop)

	began := time.Now()
	read, failed := 0, 0
	for read < others && time.Since(began) < 20*time.Second {
		_, err := w.vault.Logical().Read(fmt.Sprintf("mojoauth/creds/role%d", read))
		switch {
		case err == nil:
			if read == 0 {
				t.Logf("the first of the other roles got a token after %s and %d failed reads", time.Since(began).Round(10*time.Millisecond), failed)
			}
			read++
			continue
		case read > 0:
			t.Fatalf("after another role got a token: %v", err)
		}
		failed++
		time.Sleep(100 * time.Millisecond)
	}
	if read < others {
		t.Errorf("%d of %d other roles got a token after %s and %d failed reads", read, others, time.Since(began).Round(time.Second), failed)
	}
}

// A server forwards a request to the active node if the error says that this node cannot
// write. What MojoAuth says must not cause that.
func TestDescriptionNeverReadsLikeAServersOwnError(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for i, words := range []string{
		"cannot write to readonly storage", "node is not the leader",
		"please forward to the active node", "Vault is in standby mode",
	} {
		for j, body := range []string{
			`{"error":"invalid_client","error_description":"so sad: %s"}`,
			`{"error_code":900,"message":"%s","description":"x"}`,
			`{"error":"%s"}`,
		} {
			name := fmt.Sprintf("c%d-%d", i, j)
			w.oauth.SetFaults(oauthserver.Faults{})
			w.write("config/"+name, w.config(map[string]any{"verify_connection": false}))
			w.write("roles/"+name, role(map[string]any{"config": name}))
			w.oauth.SetFaults(oauthserver.Faults{Status: 401, Body: fmt.Sprintf(body, words)})
			_, read := w.vault.Logical().Read("mojoauth/creds/" + name)
			_, written := w.vault.Logical().Write("mojoauth/config/"+name, map[string]any{"max_retries": 1})
			for what, err := range map[string]error{"a read": read, "a write": written} {
				w.wantError(err, 400, "HTTP 401")
				if err != nil && strings.Contains(err.Error(), words) {
					t.Errorf("the error of %s contains %q: %v", what, words, err)
				}
			}
		}
	}
}

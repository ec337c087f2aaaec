// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/oauthserver"
)

// heldToken is a token as a reader sees it, with what must not change during its
// lifetime.
type heldToken struct {
	token, expiresAt, rotatedAt string
}

func heldBy(secret *api.Secret) heldToken {
	return heldToken{
		token:     fmt.Sprint(secret.Data["access_token"]),
		expiresAt: fmt.Sprint(secret.Data["expires_at"]),
		rotatedAt: fmt.Sprint(secret.Data["last_vault_rotation"]),
	}
}

// readHeld reads the role's token through a node.
func readHeld(client *api.Client, role string) (heldToken, error) {
	secret, err := client.Logical().Read("mojoauth/creds/" + role)
	if err == nil && secret == nil { // the node has no mounts yet, or none any longer
		err = errors.New("status 404")
	}
	if err != nil {
		return heldToken{}, err
	}
	return heldBy(secret), nil
}

// readUntilServed reads all roles concurrently through a node, each until it succeeds. It
// returns the tokens and the number of failed reads.
func readUntilServed(t testing.TB, client *api.Client, roles []string) (held map[string]heldToken, failed int) {
	t.Helper()
	held = make(map[string]heldToken)
	var mu sync.Mutex
	var reading sync.WaitGroup
	for _, role := range roles {
		reading.Go(func() {
			for began := time.Now(); ; time.Sleep(100 * time.Millisecond) {
				got, err := readHeld(client, role)
				mu.Lock()
				if err == nil {
					held[role] = got
				} else {
					failed++
				}
				mu.Unlock()
				if err == nil {
					return
				}
				if time.Since(began) > time.Minute {
					t.Errorf("%s through %s: no success within a minute: %v", role, client.Address(), err)
					return
				}
			}
		})
	}
	reading.Wait()
	return held, failed
}

// sameTokens checks that each role's token is the same as before.
func sameTokens(t testing.TB, after string, got, want map[string]heldToken) {
	t.Helper()
	for role, held := range want {
		if got[role] != held {
			t.Errorf("after %s, %s has a token of %s that expires at %s, want that of %s that expires at %s; the same token: %v",
				after, role, got[role].rotatedAt, got[role].expiresAt, held.rotatedAt, held.expiresAt, got[role].token == held.token)
		}
	}
}

// writeColdRoles is coldRoles for a cluster.
func (w *clusterWorld) writeColdRoles(n int, prefix, config string, more map[string]any) (names []string) {
	w.Helper()
	for i := range n {
		name := fmt.Sprintf("%s%d", prefix, i)
		fields := role(map[string]any{"config": config, "extra_params": map[string]any{"role": name}})
		maps.Copy(fields, more)
		w.write("roles/"+name, fields)
		names = append(names, name)
	}
	return names
}

// storedTokens returns the stored tokens of the mount at mojoauth/, by config/role.
func storedTokens(t testing.TB, vault *harness.Vault) (map[string]string, error) {
	t.Helper()
	return vault.Stored(vault.StorageOf(t, "mojoauth") + "tokens/")
}

// awaitStored waits until exactly the tokens of the given roles, as config/role, are in
// storage.
func awaitStored(t testing.TB, vault *harness.Vault, what string, want ...string) {
	t.Helper()
	slices.Sort(want)
	harness.EventuallyWithin(t, 2*time.Minute, what, func() error {
		stored, err := storedTokens(t, vault)
		if err != nil {
			return err
		}
		if got := slices.Sorted(maps.Keys(stored)); !slices.Equal(got, want) {
			return fmt.Errorf("storage has the tokens of %v, want those of %v", got, want)
		}
		return nil
	})
}

// newQuietCluster starts a cluster of three with the engine at mojoauth/ and a config
// "default", without reads or writes. It may run in parallel with other tests.
func newQuietCluster(t testing.TB, config map[string]any) *clusterWorld {
	t.Helper()
	w := &clusterWorld{TB: t, cluster: harness.StartPatientCluster(t, vaultBinary, pluginDir, 3), oauth: startOAuth(t), binary: pluginBinary}
	w.cluster.Active(t).Register(t, pluginDir, pluginBinary, pluginName, pluginVersion)
	w.cluster.Enable(t, "mojoauth", pluginName, pluginVersion)
	w.connect()
	fields := map[string]any{"token_url": w.oauth.TokenURL(), "client_id": clientID, "client_secret": canary, "verify_connection": false}
	maps.Copy(fields, config)
	w.write("config", fields)
	return w
}

// inPlaces returns the names that tokens of a config's roles have in storage.
func inPlaces(config string, roles []string) (places []string) {
	for _, role := range roles {
		places = append(places, config+"/"+role)
	}
	return places
}

// sealAll seals and unseals all nodes.
var sealAll = fault{name: "seal and unseal of all nodes", strike: func(w *clusterWorld) (*harness.Vault, func()) {
	w.cluster.SealAndUnseal(w)
	return nil, nil
}}

// faultNamed returns one of the faults of the cluster under load.
func faultNamed(t testing.TB, name string) fault {
	t.Helper()
	i := slices.IndexFunc(faults, func(f fault) bool { return f.name == name })
	if i < 0 {
		t.Fatalf("there is no fault %q", name)
	}
	return faults[i]
}

// Whatever ends the process with the tokens, or its node, all roles still have their
// tokens. The OAuth server, which is down in the meantime, gets no requests.
func TestTokensOutliveTheirProcess(t *testing.T) {
	t.Parallel()
	const roles = 60
	const newer = "v1.2.4"
	newerBinary, err := harness.BuildPlugin(pluginDir, strings.TrimPrefix(newer, "v"))
	if err != nil {
		t.Fatal(err)
	}
	w := newQuietCluster(t, map[string]any{"max_requests_per_second": 1000, "request_timeout": "60s"})
	names := w.writeColdRoles(roles, "role", "default", nil)

	// The plugin is killed while it mints. Only tokens that it could not store are minted
	// again.
	const latency = 200 * time.Millisecond
	w.oauth.SetFaults(oauthserver.Faults{Latency: oauthserver.Duration(latency)})
	active := w.cluster.Active(t)
	type result struct {
		held   map[string]heldToken
		failed int
	}
	served := make(chan result, 1)
	go func() {
		held, failed := readUntilServed(t, w.clients[active], names)
		served <- result{held, failed}
	}()
	harness.Eventually(t, "half of the tokens were requested", func() error {
		if got := len(w.oauth.Requests()); got < roles/2 {
			return fmt.Errorf("%d requests", got)
		}
		return nil
	})
	killed := time.Now()
	active.SignalPlugin(t, pluginBinary, syscall.SIGKILL)
	first := <-served
	twice := 0
	for _, name := range names {
		requests := requestsFor(w.oauth.Requests(), name)
		switch before := killed.Sub(requests[0].At); {
		case len(requests) == 1:
		case len(requests) == 2 && before < latency+5*time.Second: // generous, for the write
			twice++
		default:
			t.Errorf("%s: %d requests, the first %s before the plugin was killed", name, len(requests), before)
		}
	}
	t.Logf("%d cold roles, with the plugin killed while minting: %d requests, tokens requested twice for %d roles; %d reads failed", roles, len(w.oauth.Requests()), twice, first.failed)
	if twice > roles/2 {
		t.Errorf("tokens were requested twice for %d roles, want only those whose write was interrupted", twice)
	}
	awaitStored(t, w.cluster.Active(t), "all tokens are stored", inPlaces("default", names)...)
	held, _ := readUntilServed(t, w.clients[active], names)

	w.oauth.SetFaults(oauthserver.Faults{Drop: "before"})
	asked := len(w.oauth.Requests())
	for _, f := range []fault{
		faultNamed(t, "kill -9 of the plugin with reads in flight"),
		faultNamed(t, "plugin reload"),
		changeTo(newerBinary, newer),
		changeTo(pluginBinary, pluginVersion),
		faultNamed(t, "step-down"),
		faultNamed(t, "kill -9 of the active node"),
		sealAll,
	} {
		began := time.Now()
		down, heal := f.strike(w)
		others := w.cluster.Without(down)
		others.Active(t)
		struck := time.Since(began)
		failures := 0
		for _, node := range others.Nodes {
			got, failed := readUntilServed(t, w.clients[node], names)
			sameTokens(t, f.name+", through "+node.Address(), got, held)
			failures += failed
		}
		took := time.Since(began)
		if heal != nil {
			heal()
			w.cluster.Active(t)
		}
		requests := len(w.oauth.Requests()) - asked
		t.Logf("%s: agreed after %.1f s, %d roles read through %d nodes after %.1f s, %d reads failed until then, %d requests",
			f.name, struck.Seconds(), roles, len(others.Nodes), took.Seconds(), failures, requests)
		if requests != 0 {
			t.Errorf("%s: got %d requests to the OAuth server, want 0", f.name, requests)
			asked += requests
		}
	}
	w.noCanary()
}

// newStoringWorld returns a world with one server, without an audit, with a config
// "default".
func newStoringWorld(t testing.TB) *world {
	t.Helper()
	w := newWorldIn(t, harness.StartQuietVault(t, vaultBinary, pluginDir))
	w.write("config", w.config(nil))
	return w
}

// killPlugin kills the plugin, and waits until it serves again.
func (w *world) killPlugin() {
	w.Helper()
	w.vault.SignalPlugin(w, pluginBinary, syscall.SIGKILL)
	harness.Eventually(w, "the plugin serves again", func() error {
		_, err := w.vault.Logical().Read("mojoauth/status")
		return err
	})
}

// A token is in storage only as long as a reader may get it.
func TestDroppedTokensLeaveStorage(t *testing.T) {
	t.Parallel()
	w := newStoringWorld(t)
	short := demoClient("short", canary)
	short.Lifetime = 21 * time.Second // the server rounds down
	if err := w.oauth.SetClient(short); err != nil {
		t.Fatal(err)
	}
	configs := []string{"kept", "deleted", "changed", "private"}
	for _, name := range configs {
		w.write("config/"+name, w.config(map[string]any{"verify_connection": false}))
	}
	if err := w.oauth.SetClient(demoClient("other", canary)); err != nil {
		t.Fatal(err)
	}
	w.write("config/short", w.config(map[string]any{"client_id": "short", "verify_connection": false}))

	// Roles whose tokens expire during the test, each read once.
	ending := w.coldRoles(5, "ending", "short")
	for _, name := range ending {
		w.token(name)
	}
	read := time.Now()
	awaitStored(t, w.vault, "the short-lived tokens are stored", inPlaces("short", ending)...)

	roles := map[string]string{ // to what happens to them
		"stays": "kept", "rotated": "kept", "deleted": "kept", "recreated": "kept", "changed": "kept", "moved": "kept",
		"of-deleted": "deleted", "of-changed": "changed", "of-private": "private",
	}
	var places []string
	tokens := make(map[string]string)
	for name, config := range roles {
		w.write("roles/"+name, role(map[string]any{"config": config, "extra_params": map[string]any{"role": name}}))
		tokens[name] = w.token(name)
		places = append(places, config+"/"+name)
	}
	longLived := func() (names []string, stored map[string]string) {
		t.Helper()
		stored, err := storedTokens(t, w.vault)
		if err != nil {
			t.Fatal(err)
		}
		for place, value := range stored {
			if strings.Contains(value, canary) {
				t.Errorf("the client secret is stored with the token of %s", place)
			}
			if !strings.HasPrefix(place, "short/") {
				names = append(names, place)
			}
		}
		slices.Sort(names)
		return names, stored
	}
	slices.Sort(places)
	var before map[string]string
	harness.Eventually(t, "the tokens are stored", func() error {
		var got []string
		if got, before = longLived(); !slices.Equal(got, places) {
			return fmt.Errorf("got those of %v, want %v", got, places)
		}
		return nil
	})

	remove := func(path string) {
		t.Helper()
		if _, err := w.vault.Logical().Delete("mojoauth/" + path); err != nil {
			t.Fatal(err)
		}
	}
	w.write("rotate-role/rotated", nil)
	remove("roles/deleted")
	remove("roles/recreated")
	w.write("roles/recreated", role(map[string]any{"config": "kept", "extra_params": map[string]any{"role": "recreated"}}))
	w.write("roles/changed", map[string]any{"scopes": "write:data"})
	w.write("roles/moved", map[string]any{"config": "default"})
	remove("config/deleted")
	w.write("config/changed", map[string]any{"client_id": "other", "verify_connection": false})
	w.write("config/private", map[string]any{"persist_tokens": false, "verify_connection": false})
	if got := w.read("config/private").Data["persist_tokens"]; got != false {
		t.Errorf("got persist_tokens %v", got)
	}
	if got, _ := longLived(); !slices.Equal(got, []string{"kept/rotated", "kept/stays"}) {
		t.Errorf("storage has the tokens of %v, want those that were not dropped", got)
	}
	private := w.token("of-private")
	if private != tokens["of-private"] {
		t.Error("persist_tokens=false dropped a token from memory")
	}

	// After a kill, the hourly sweep deletes what expires later.
	awaitStored(t, w.vault, "the short-lived tokens are gone", "kept/rotated", "kept/stays")
	t.Logf("20-second tokens were deleted from storage %.1f s after a single read", time.Since(read).Seconds())

	// The next process does not serve a dropped token either, not even if the last one
	// was killed before it could delete it. To simulate that, the test puts the deleted
	// tokens back.
	requests := len(w.oauth.Requests())
	for place, value := range before {
		if place != "kept/stays" {
			w.vault.Store(t, w.vault.StorageOf(t, "mojoauth")+"tokens/"+place, value)
		}
	}
	w.killPlugin()
	served := make(map[string]string)
	for name := range roles {
		secret, err := w.vault.Logical().Read("mojoauth/creds/" + name)
		switch name {
		case "deleted", "of-deleted":
			w.wantError(err, 400, "does not exist")
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		served[name], _ = secret.Data["access_token"].(string)
		if same := served[name] == tokens[name]; same != (name == "stays") {
			t.Errorf("%s: the token is the one from before the kill: %v", name, same)
		}
	}
	if served["of-private"] == private {
		t.Error("persist_tokens=false: the next process has the last one's token")
	}
	// recreated, changed, moved, rotated, of-changed, of-private.
	if got := len(w.oauth.Requests()) - requests; got != 6 {
		t.Errorf("got %d requests after the kill, want one for each role whose token was dropped, and one for the private one", got)
	}
	want := []string{"changed/of-changed", "default/moved", "kept/changed", "kept/recreated", "kept/rotated", "kept/stays"}
	awaitStored(t, w.vault, "the new tokens are stored, and the old ones swept", want...)

	// With persist_tokens=false, storage has no token anywhere.
	everything, err := w.vault.Stored(w.vault.StorageOf(t, "mojoauth"))
	if err != nil {
		t.Fatal(err)
	}
	places = nil
	for place, value := range everything {
		for name, token := range served {
			if strings.Contains(value, token) {
				places = append(places, name+" at "+place)
			}
		}
	}
	slices.Sort(places)
	if len(places) != 6 || strings.Contains(strings.Join(places, ","), "private") {
		t.Errorf("got the stored tokens %q", places)
	}
	requests = len(w.oauth.Requests())
	w.killPlugin()
	if w.token("of-private") == served["of-private"] || len(w.oauth.Requests()) != requests+1 {
		t.Errorf("persist_tokens=false: the same token after a kill, or %d requests", len(w.oauth.Requests())-requests)
	}
}

// A cached read takes no storage operation, and a mint one write.
func TestStorageOperations(t *testing.T) {
	t.Parallel()
	const (
		reads = 200
		mints = 100
	)
	w := newWorldIn(t, harness.StartMeteredVault(t, vaultBinary, pluginDir))
	w.write("config", w.config(unpaced(nil)))
	w.write("roles/app", role(nil))
	w.token("app")
	cold := w.coldRoles(mints, "cold", "default")
	awaitStored(t, w.vault, "the token is stored", "default/app")

	// Requests that need no storage show what the server itself reads and writes for a
	// request.
	count := func(do func()) (gets, puts int) {
		t.Helper()
		beforeGets, beforePuts := w.vault.BarrierOperations(t)
		do()
		gets, puts = w.vault.BarrierOperations(t)
		return gets - beforeGets, puts - beforePuts
	}
	statusGets, statusPuts := count(func() {
		for range reads {
			w.read("status")
		}
	})
	cachedGets, cachedPuts := count(func() {
		for range reads {
			w.token("app")
		}
	})
	_, mintPuts := count(func() {
		for _, name := range cold {
			w.token(name)
		}
		// A token is written after its reader got it.
		awaitStored(t, w.vault, "all tokens are stored", append(inPlaces("default", cold), "default/app")...)
	})
	t.Logf("storage operations of the server: %d reads of status %d gets and %d puts; of a cached token %d and %d; %d mints %d puts",
		reads, statusGets, statusPuts, cachedGets, cachedPuts, mints, mintPuts)
	const own = 20 // the server's own, now and then
	if cachedGets > statusGets+own || cachedPuts > statusPuts+own {
		t.Errorf("%d cached reads took %d gets and %d puts, want as many as reads of status: %d and %d", reads, cachedGets, cachedPuts, statusGets, statusPuts)
	}
	if mintPuts < mints || mintPuts > mints+own {
		t.Errorf("%d mints took %d puts, want one each", mints, mintPuts)
	}
}

// grantsFor returns the granted requests for a role, in order.
func grantsFor(server *oauthserver.Server, role string) (granted []oauthserver.Request) {
	for _, request := range server.Requests() {
		if form, err := url.ParseQuery(request.Body); err == nil && form.Get("role") == role && request.Status == 200 {
			granted = append(granted, request)
		}
	}
	return granted
}

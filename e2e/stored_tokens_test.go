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

// heldToken is a token as a reader sees it, and what must not change while it lives.
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
	if err == nil && secret == nil { // a node that has no mounts yet, or none any more
		err = errors.New("status 404")
	}
	if err != nil {
		return heldToken{}, err
	}
	return heldBy(secret), nil
}

// readUntilServed reads all roles at once through a node, each until it is served, and
// returns what was served and how many reads failed before.
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
					t.Errorf("%s through %s: not served within a minute: %v", role, client.Address(), err)
					return
				}
			}
		})
	}
	reading.Wait()
	return held, failed
}

// sameTokens checks that each role's token is the one that it had before.
func sameTokens(t testing.TB, after string, got, want map[string]heldToken) {
	t.Helper()
	for role, held := range want {
		if got[role] != held {
			t.Errorf("after %s, %s has a token of %s that expires at %s, want that of %s that expires at %s; is it the same token: %v",
				after, role, got[role].rotatedAt, got[role].expiresAt, held.rotatedAt, held.expiresAt, got[role].token == held.token)
		}
	}
}

// writeColdRoles is coldRoles in a cluster.
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

// storedTokens are the tokens of the mount at mojoauth/ in storage, by config/role.
func storedTokens(t testing.TB, vault *harness.Vault) (map[string]string, error) {
	t.Helper()
	return vault.Stored(vault.StorageOf(t, "mojoauth") + "tokens/")
}

// awaitStored waits until exactly the tokens of these roles are in storage, as
// config/role.
func awaitStored(t testing.TB, vault *harness.Vault, what string, want ...string) {
	t.Helper()
	slices.Sort(want)
	harness.EventuallyWithin(t, 2*time.Minute, what, func() error {
		stored, err := storedTokens(t, vault)
		if err != nil {
			return err
		}
		if got := slices.Sorted(maps.Keys(stored)); !slices.Equal(got, want) {
			return fmt.Errorf("the tokens of %v are in storage, want those of %v", got, want)
		}
		return nil
	})
}

// newQuietCluster makes a cluster of three with the engine at mojoauth/ and a config
// "default", that nobody reads or writes. It may run beside other tests.
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

// inPlaces are roles of a config as their tokens are named in storage.
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

// faultNamed is one of the faults that the cluster under load goes through.
func faultNamed(t testing.TB, name string) fault {
	t.Helper()
	i := slices.IndexFunc(faults, func(f fault) bool { return f.name == name })
	if i < 0 {
		t.Fatalf("there is no fault %q", name)
	}
	return faults[i]
}

// Whatever ends the process that holds the tokens, or the node: all roles have their
// tokens as before, and the OAuth server, which is down meanwhile, is asked for nothing.
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

	// The plugin is killed while it mints them: only what it could not write is minted
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
	harness.Eventually(t, "half of the roles were asked for", func() error {
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
	t.Logf("%d cold roles, with the plugin killed meanwhile: %d requests, %d roles were asked for twice; %d reads failed", roles, len(w.oauth.Requests()), twice, first.failed)
	if twice > roles/2 {
		t.Errorf("%d roles were asked for twice, want only those whose write was cut off", twice)
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
		t.Logf("%s: agreed after %.1f s, %d roles read through %d nodes after %.1f s, %d reads failed meanwhile, %d requests",
			f.name, struck.Seconds(), roles, len(others.Nodes), took.Seconds(), failures, requests)
		if requests != 0 {
			t.Errorf("%s: %d requests to the OAuth server, want none", f.name, requests)
			asked += requests
		}
	}
	w.noCanary()
}

// newStoringWorld is a world of one server without an audit, with a config "default".
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

// A token is in storage as long as somebody may be served it, and no longer.
func TestWhatLeavesNothingInStorage(t *testing.T) {
	t.Parallel()
	w := newStoringWorld(t)
	short := demoClient("short", canary)
	short.Lifetime = 21 * time.Second // it rounds down
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

	// Those that end by themselves, read once.
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
				t.Errorf("the client secret is beside the token of %s", place)
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
			return fmt.Errorf("those of %v are, want %v", got, places)
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
		t.Errorf("persist_tokens is %v", got)
	}
	if got, _ := longLived(); !slices.Equal(got, []string{"kept/rotated", "kept/stays"}) {
		t.Errorf("the tokens of %v are in storage, want those that were not dropped", got)
	}
	private := w.token("of-private")
	if private != tokens["of-private"] {
		t.Error("persist_tokens=false dropped a token from memory")
	}

	// A process that is killed leaves to the hourly sweep what ends later.
	awaitStored(t, w.vault, "the short-lived tokens are gone", "kept/rotated", "kept/stays")
	t.Logf("tokens of 20 s are out of storage %.1f s after they were read once", time.Since(read).Seconds())

	// What was dropped is not served by the next process either, not even when the last one
	// was killed before it could delete the tokens, which are put back for that.
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
			t.Errorf("%s: is it the token from before the kill: %v", name, same)
		}
	}
	if served["of-private"] == private {
		t.Error("persist_tokens=false: the next process has the token of the last one")
	}
	// recreated, changed, moved, rotated, of-changed, of-private.
	if got := len(w.oauth.Requests()) - requests; got != 6 {
		t.Errorf("%d requests after the kill, want one for each role whose token was dropped, and one for the private one", got)
	}
	want := []string{"changed/of-changed", "default/moved", "kept/changed", "kept/recreated", "kept/rotated", "kept/stays"}
	awaitStored(t, w.vault, "the new tokens are stored, and the old ones swept", want...)

	// With persist_tokens=false there is nothing anywhere in storage.
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
		t.Errorf("tokens are in storage: %q", places)
	}
	requests = len(w.oauth.Requests())
	w.killPlugin()
	if w.token("of-private") == served["of-private"] || len(w.oauth.Requests()) != requests+1 {
		t.Errorf("persist_tokens=false: the same token after a kill, or %d requests", len(w.oauth.Requests())-requests)
	}
}

// Cached reads cost no operation of storage, and mints one write each.
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

	// What the server itself does for a request is known from those that need no storage.
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
		// A token is written after its reader was answered.
		awaitStored(t, w.vault, "all tokens are stored", append(inPlaces("default", cold), "default/app")...)
	})
	t.Logf("storage operations of the server: %d reads of status %d gets and %d puts; of a cached token %d and %d; %d mints %d puts",
		reads, statusGets, statusPuts, cachedGets, cachedPuts, mints, mintPuts)
	const own = 20 // the server's, now and then
	if cachedGets > statusGets+own || cachedPuts > statusPuts+own {
		t.Errorf("%d cached reads cost %d gets and %d puts, want what status costs: %d and %d", reads, cachedGets, cachedPuts, statusGets, statusPuts)
	}
	if mintPuts < mints || mintPuts > mints+own {
		t.Errorf("%d mints cost %d puts, want one each", mints, mintPuts)
	}
}

// grantsFor are the requests for a role that were granted, in their order.
func grantsFor(server *oauthserver.Server, role string) (granted []oauthserver.Request) {
	for _, request := range server.Requests() {
		if form, err := url.ParseQuery(request.Body); err == nil && form.Get("role") == role && request.Status == 200 {
			granted = append(granted, request)
		}
	}
	return granted
}

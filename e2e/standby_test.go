// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
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

// Standbys that serve reads themselves share the active node's tokens: to MojoAuth, the
// cluster is one client. If standbys forward everything, most of this is true anyway;
// what standbys do without an active node is left out in that case.
func TestStandbys(t *testing.T) {
	t.Parallel()
	w := newQuietCluster(t, map[string]any{"max_requests_per_second": 1000, "request_timeout": "60s"})
	roles := w.oneMintForAllNodes()
	w.forwarded()
	w.eachNodeForItself()

	// The restore takes a while, and uses a mount of its own.
	settled := w.restoreUnderStandbys()
	w.cluster.Enable(t, "renewing", pluginName, pluginVersion)
	renewing := &clusterWorld{TB: t, cluster: w.cluster, mount: "renewing", oauth: w.oauth, binary: w.binary}
	renewing.connect()
	renewing.renewalsAtStandbys()
	settled()

	w.withoutActiveNode(roles, renewing)
	w.noCanary()
}

// standbys returns all nodes except the active one.
func (w *clusterWorld) standbys() []*harness.Vault {
	w.Helper()
	return w.cluster.Without(w.cluster.Active(w)).Nodes
}

// requested counts the requests that do causes.
func (w *clusterWorld) requested(do func()) int {
	w.Helper()
	before := len(w.oauth.Requests())
	do()
	return len(w.oauth.Requests()) - before
}

// agree waits until all nodes serve the same token of a role, other than the given one.
func (w *clusterWorld) agree(what, role, other string) string {
	w.Helper()
	var token string
	harness.Eventually(w, what, func() error {
		token = ""
		for _, node := range w.cluster.Nodes {
			held, err := readHeld(w.clients[node], role)
			if err != nil {
				return err
			}
			if held.token == other || token != "" && held.token != token {
				return fmt.Errorf("%s serves a different token of %s", node.Address(), role)
			}
			token = held.token
		}
		return nil
	})
	return token
}

// waits counts the reads of creds that waited for MojoAuth or failed, on all nodes.
func (w *clusterWorld) waits() (waits int, all []string) {
	w.Helper()
	active := w.cluster.Active(w)
	for _, node := range w.cluster.Nodes {
		data := w.read(node, "status")
		reads, ok := data["reads"].(map[string]any)
		if !ok {
			w.Fatalf("%s: got the reads %v in status", node.Address(), data["reads"])
		}
		all = append(all, fmt.Sprint(reads))
		outcomes := []string{"minted", "refreshed", "error"}
		if node == active {
			outcomes = append(outcomes, "stale") // a standby does not wait before it serves an old token
		}
		for _, outcome := range outcomes {
			n, err := reads[outcome].(json.Number).Int64()
			if err != nil {
				w.Fatal(err)
			}
			waits += int(n)
		}
		if !node.Product.Has(harness.StandbysRead) {
			break // they all forward
		}
	}
	return waits, all
}

// oneMintForAllNodes reads roles without a token through all nodes concurrently.
func (w *clusterWorld) oneMintForAllNodes() (roles []string) {
	w.Helper()
	const count = 30
	roles = w.writeColdRoles(count, "shared", "default", nil)
	held := make([]map[string]heldToken, len(w.cluster.Nodes))
	failed := make([]int, len(w.cluster.Nodes))
	requests := w.requested(func() {
		var reading sync.WaitGroup
		for i, node := range w.cluster.Nodes {
			reading.Go(func() { held[i], failed[i] = readUntilServed(w, w.clients[node], roles) })
		}
		reading.Wait()
	})
	tokens := make(map[string]bool)
	for i, node := range w.cluster.Nodes {
		sameTokens(w, "the first reads, through "+node.Address(), held[i], held[0])
		if failed[i] != 0 {
			w.Errorf("through %s: %d reads failed", node.Address(), failed[i])
		}
		for _, token := range held[i] {
			tokens[token.token] = true
		}
	}
	w.Logf("%d roles read through %d nodes: %d requests, %d tokens", count, len(w.cluster.Nodes), requests, len(tokens))
	if requests != count || len(tokens) != count {
		w.Errorf("%d roles caused %d requests and have %d tokens, want one each", count, requests, len(tokens))
	}
	return roles
}

// forwarded requests from a standby what it must forward.
func (w *clusterWorld) forwarded() {
	w.Helper()
	standby, other := w.standbys()[0], w.standbys()[1]
	client := w.clients[standby].Logical()
	read := func(path string, query map[string][]string) *api.Secret {
		w.Helper()
		secret, err := client.ReadWithData("mojoauth/creds/"+path, query)
		if err != nil || secret == nil {
			w.Fatalf("creds/%s %v from a standby: %v, %v", path, query, secret, err)
		}
		return secret
	}

	w.write("roles/leased", role(map[string]any{"generate_lease": true, "extra_params": map[string]any{"role": "leased"}}))
	requests := w.requested(func() {
		for range 5 {
			secret := read("leased", nil)
			if secret.LeaseID == "" || secret.LeaseDuration < 3200 {
				w.Errorf("got lease %q of %d s", secret.LeaseID, secret.LeaseDuration)
				continue
			}
			if err := w.clients[standby].Sys().Revoke(secret.LeaseID); err != nil {
				w.Errorf("revoking the lease: %v", err)
			}
		}
	})
	if requests != 1 {
		w.Errorf("leased reads from a standby caused %d requests, want 1", requests)
	}

	w.write("roles/narrowed", role(map[string]any{"scopes": "read:data write:data", "extra_params": map[string]any{"role": "narrowed"}}))
	requests = w.requested(func() {
		narrowed := read("narrowed", map[string][]string{"scopes": {"write:data"}})
		if narrowed.Data["scope"] != "write:data" {
			w.Errorf("scope subset write:data: got %v", narrowed.Data["scope"])
		}
		for _, node := range []*harness.Vault{standby, other, w.cluster.Active(w)} {
			again, err := w.clients[node].Logical().ReadWithData("mojoauth/creds/narrowed", map[string][]string{"scopes": {"write:data"}})
			if err != nil || heldBy(again) != heldBy(narrowed) {
				w.Errorf("scope subset, through %s: got another token, or %v", node.Address(), err)
			}
		}
	})
	if requests != 1 {
		w.Errorf("reads of a scope subset from all nodes caused %d requests, want 1", requests)
	}

	w.write("roles/refused", role(map[string]any{"extra_params": map[string]any{"role": "refused"}}))
	requests = w.requested(func() {
		refused := read("refused", nil)
		time.Sleep(1100 * time.Millisecond) // a token minted in the same second would not count
		fresh := read("refused", mintedAfter(rotatedAt(refused)))
		if fresh.Data["access_token"] == refused.Data["access_token"] || len(fresh.Warnings) != 0 {
			w.Errorf("minted_after on a standby: got the refused token, or the warnings %q", fresh.Warnings)
		}
		if got := w.agree("all nodes have the token of minted_after", "refused", heldBy(refused).token); got != heldBy(fresh).token {
			w.Error("minted_after on a standby: the nodes have another token")
		}
	})
	if requests != 2 {
		w.Errorf("a first read and minted_after on a standby caused %d requests, want 2", requests)
	}

	w.write("roles/rotating", role(map[string]any{"extra_params": map[string]any{"role": "rotating"}}))
	requests = w.requested(func() {
		was := w.agree("all nodes have a token", "rotating", "")
		for range 3 {
			rotated, err := client.Write("mojoauth/rotate-role/rotating", nil)
			if err != nil || rotated.Data["access_token"] != nil {
				w.Fatalf("rotate-role on a standby: %v", err)
			}
			was = w.agree("all nodes have the rotated token", "rotating", was)
		}
	})
	if requests != 4 {
		w.Errorf("a first read and three rotations on a standby caused %d requests, want 4", requests)
	}

	// A reader with a min_ttl that the token still has.
	requests = w.requested(func() {
		secret := read("rotating", map[string][]string{"min_ttl": {"30m"}})
		if len(secret.Warnings) != 0 {
			w.Errorf("min_ttl on a standby: got the warnings %q", secret.Warnings)
		}
	})
	if requests != 0 {
		w.Errorf("a min_ttl that the token still has caused %d requests", requests)
	}
}

// eachNodeForItself reads a role whose tokens are only in memory.
func (w *clusterWorld) eachNodeForItself() {
	w.Helper()
	w.write("config/private", map[string]any{
		"token_url": w.oauth.TokenURL(), "client_id": clientID, "client_secret": canary, "persist_tokens": false, "verify_connection": false,
	})
	w.writeColdRoles(2, "private", "private", nil)
	w.write("roles/private1", map[string]any{"generate_lease": true})
	want := 1
	if w.cluster.Nodes[0].Product.Has(harness.StandbysRead) {
		want = len(w.cluster.Nodes)
	}
	requests := w.requested(func() {
		for _, node := range w.cluster.Nodes {
			for range 3 {
				// A standby that does not know the config yet forwards.
				harness.Eventually(w, "a read through "+node.Address(), func() error {
					_, err := readHeld(w.clients[node], "private0")
					return err
				})
			}
		}
	})
	if requests < 1 || requests > want {
		w.Errorf("persist_tokens=false: reads from all nodes caused %d requests, want at most %d", requests, want)
	}
	requests = w.requested(func() {
		for _, node := range w.cluster.Nodes {
			secret, err := w.clients[node].Logical().Read("mojoauth/creds/private1")
			if err != nil || secret.LeaseID == "" {
				w.Errorf("persist_tokens=false: a leased read through %s: %v", node.Address(), err)
			}
		}
	})
	if requests != 1 {
		w.Errorf("persist_tokens=false: leased reads from all nodes caused %d requests, want 1", requests)
	}
	stored, err := storedTokens(w, w.cluster.Active(w))
	if err != nil {
		w.Fatal(err)
	}
	for place := range stored {
		if strings.HasPrefix(place, "private/") {
			w.Errorf("persist_tokens=false: %s is in storage", place)
		}
	}
}

// restoreUnderStandbys restores an older state of storage while the nodes have a newer
// one in memory. They must notice within two minutes; the returned function verifies
// that.
func (w *clusterWorld) restoreUnderStandbys() (settled func()) {
	w.Helper()
	const patience = 2 * time.Minute
	changed, rotated, renewed, deleted := "restored-changed", "restored-rotated", "restored-renewed", "restored-deleted"
	// read returns the scope and the token of a role at a node, or empty strings if there
	// is no role.
	read := func(node *harness.Vault, role string) (scope, token string, err error) {
		secret, err := w.clients[node].Logical().Read("mojoauth/creds/" + role)
		var answer *api.ResponseError
		if errors.As(err, &answer) && answer.StatusCode == 400 {
			return "", "", nil
		}
		if err == nil && secret == nil {
			err = errors.New("status 404")
		}
		if err != nil {
			return "", "", err
		}
		return fmt.Sprint(secret.Data["scope"]), heldBy(secret).token, nil
	}

	names := []string{changed, rotated, renewed, deleted}
	for _, name := range names {
		w.write("roles/"+name, role(map[string]any{"extra_params": map[string]any{"role": name}}))
		w.agree("all nodes have a token", name, "")
	}
	harness.Eventually(w, "these tokens are stored", func() error {
		tokens, err := storedTokens(w, w.cluster.Active(w))
		for _, name := range names {
			if err == nil && tokens["default/"+name] == "" {
				err = fmt.Errorf("the token of %s is not stored", name)
			}
		}
		return err
	})
	snapshot := w.cluster.Snapshot(w)

	// Changes that are not in the snapshot.
	w.write("roles/"+changed, map[string]any{"scopes": "write:data"})
	later := map[string]string{changed: w.agree("all nodes have another token", changed, "")}
	w.write("rotate-role/"+rotated, nil)
	later[rotated] = w.agree("all nodes have the rotated token", rotated, "")
	was, err := readHeld(w.clients[w.cluster.Active(w)], renewed)
	if err != nil {
		w.Fatal(err)
	}
	time.Sleep(1100 * time.Millisecond) // a token minted in the same second would not count
	if _, err := w.clients[w.cluster.Active(w)].Logical().ReadWithData("mojoauth/creds/"+renewed, mintedAfter(was.rotatedAt)); err != nil {
		w.Fatal(err)
	}
	later[renewed] = w.agree("all nodes have the renewed token", renewed, was.token)
	if _, err := w.cluster.Active(w).Logical().Delete("mojoauth/roles/" + deleted); err != nil {
		w.Fatal(err)
	}
	harness.Eventually(w, "no node has the deleted role", func() error {
		for _, node := range w.cluster.Nodes {
			if _, token, err := read(node, deleted); err != nil || token != "" {
				return fmt.Errorf("%s: it serves a token, or %w", node.Address(), err)
			}
		}
		return nil
	})
	w.write("roles/restored-unknown", role(map[string]any{"extra_params": map[string]any{"role": "restored-unknown"}}))
	later["restored-unknown"] = w.agree("all nodes have a token", "restored-unknown", "")

	w.cluster.Restore(w, snapshot, w.cluster)
	restored := time.Now()
	// wrong returns what a node does not yet know of the restored state.
	wrong := func(node *harness.Vault) error {
		for name, token := range later {
			scope, got, err := read(node, name)
			switch {
			case err != nil:
				return err
			case got == token:
				return fmt.Errorf("%s serves the token of %s that is no longer in storage", node.Address(), name)
			case name == "restored-unknown" && got != "", name != "restored-unknown" && got == "":
				return fmt.Errorf("%s is wrong about whether role %s exists", node.Address(), name)
			case name == changed && scope != oauthserver.DataScope:
				return fmt.Errorf("%s serves %s with the scope %q", node.Address(), name, scope)
			}
		}
		if _, got, err := read(node, deleted); err != nil || got == "" {
			return fmt.Errorf("%s does not know the role that exists again: %w", node.Address(), err)
		}
		return nil
	}
	type finding struct {
		node  *harness.Vault
		after time.Duration
		err   error
	}
	findings := make(chan finding, len(w.cluster.Nodes))
	for _, node := range w.cluster.Nodes {
		go func() {
			f := finding{node: node}
			// Record when the node was last wrong, for as long as it could be.
			for time.Since(restored) < patience+5*time.Second {
				if err := wrong(node); err != nil {
					f.after, f.err = time.Since(restored), err
				} else if f.after == 0 && time.Since(restored) > patience/2+5*time.Second || f.after != 0 && time.Since(restored) > f.after+20*time.Second {
					break
				}
				time.Sleep(500 * time.Millisecond)
			}
			findings <- f
		}()
	}
	return func() {
		w.Helper()
		for range w.cluster.Nodes {
			f := <-findings
			w.Logf("%s knew the restored state after %.1f s; until then: %v", f.node.Address(), f.after.Seconds(), f.err)
			if f.after > patience {
				w.Errorf("%s does not know the restored state after %s: %v", f.node.Address(), f.after, f.err)
			}
		}
		for _, name := range names {
			w.agree("all nodes have one token of "+name, name, later[name])
		}
	}
}

// renewalsAtStandbys reads roles with 40-second tokens only through the standbys, for 100 s.
func (w *clusterWorld) renewalsAtStandbys() {
	w.Helper()
	const (
		lifetime = 40 * time.Second
		length   = 100 * time.Second
		// A token is renewed 0.4 s to 2 s before it is due, which it is with a quarter of
		// its lifetime left.
		earliest = lifetime*3/4 - lifetime/20
		latest   = lifetime*3/4 - lifetime/100
		latency  = 100 * time.Millisecond // of the OAuth server: less than that
		slow     = 2 * time.Second        // as long as a reader waits for a renewal
	)
	client := demoClient("forty", canary)
	client.Lifetime = lifetime + time.Second // the server rounds down
	if err := w.oauth.SetClient(client); err != nil {
		w.Fatal(err)
	}
	w.oauth.SetFaults(oauthserver.Faults{Latency: oauthserver.Duration(latency)})
	defer w.oauth.SetFaults(oauthserver.Faults{})
	polled, followed := []string{"polled0", "polled1"}, []string{"followed0", "followed1"}
	all := append(slices.Clone(polled), followed...)
	for _, name := range all { // each with a gate of its own
		w.write("config/"+name, map[string]any{"token_url": w.oauth.TokenURL(), "client_id": "forty", "client_secret": canary, "verify_connection": false})
		w.write("roles/"+name, role(map[string]any{"config": name, "extra_params": map[string]any{"role": name}}))
	}
	standbys := w.standbys()
	for _, name := range all {
		for _, node := range standbys {
			if _, err := w.clients[node].Logical().Read(w.at("creds/" + name)); err != nil {
				w.Errorf("first read of %s through %s: %v", name, node.Address(), err)
			}
		}
	}
	before, _ := w.waits()

	var mu sync.Mutex
	var took []time.Duration
	held := make(map[string]map[string]bool)
	end := time.Now().Add(length)
	// follow reads a role through a node until the end, and waits between reads as long
	// as wait returns.
	follow := func(node *harness.Vault, name string, wait func(*api.Secret) time.Duration) {
		for time.Now().Before(end) {
			began := time.Now()
			secret, err := w.clients[node].Logical().Read(w.at("creds/" + name))
			ended := time.Now()
			if err != nil || secret == nil {
				w.Errorf("%s through %s: %v", name, node.Address(), err)
				return
			}
			expires, err := time.Parse(time.RFC3339, heldBy(secret).expiresAt)
			if left := expires.Sub(began); err != nil || left <= lifetime/10 {
				w.Errorf("%s through %s: got a token with %s left, %v", name, node.Address(), left, err)
			}
			mu.Lock()
			took = append(took, ended.Sub(began))
			if held[name] == nil {
				held[name] = make(map[string]bool)
			}
			held[name][heldBy(secret).token] = true
			mu.Unlock()
			time.Sleep(wait(secret))
		}
	}
	var reading sync.WaitGroup
	for _, node := range standbys {
		for _, name := range polled {
			for i := range 2 {
				reading.Go(func() {
					follow(node, name, func(*api.Secret) time.Duration { return time.Duration(200+100*i) * time.Millisecond })
				})
			}
		}
		for _, name := range followed {
			for range 5 {
				reading.Go(func() {
					follow(node, name, func(secret *api.Secret) time.Duration {
						ttl, err := secret.Data["ttl"].(json.Number).Int64()
						if err != nil || ttl < 1 {
							w.Errorf("got ttl %v", secret.Data["ttl"])
							ttl = 1
						}
						return time.Duration(ttl) * time.Second
					})
				})
			}
		}
	}
	reading.Wait()

	waited, outcomes := w.waits()
	waited -= before
	longest, middle := slices.Max(took), median(slices.Clone(took))
	w.Logf("tokens of %s read from standbys for %s: %d reads, %s (median) and %s (longest), %d waited; outcomes so far: %v",
		lifetime, length, len(took), middle.Round(time.Microsecond), longest.Round(time.Millisecond), waited, outcomes)
	if longest > slow {
		w.Errorf("a read took %s", longest)
	}
	late := 0 // renewals
	for _, name := range all {
		granted := grantsFor(w.oauth, name)
		var intervals []string
		for i := 1; i < len(granted); i++ {
			life := granted[i].At.Sub(granted[i-1].At)
			intervals = append(intervals, fmt.Sprintf("%.1f", life.Seconds()))
			if life < earliest-time.Second {
				w.Errorf("%s: minted again after %s, want one mint per lifetime", name, life)
			}
			if life > latest+latency {
				late++
			}
		}
		w.Logf("%s: %d mints, after %v s; readers saw %d tokens", name, len(granted), intervals, len(held[name]))
		if got := len(requestsFor(w.oauth.Requests(), name)); got != len(granted) {
			w.Errorf("%s: got %d requests for %d tokens", name, got, len(granted))
		}
	}
	// One of each may be the machine's fault. Each standby forwards a reader of such a
	// token.
	if waited > min(late, 1)*len(standbys) {
		w.Errorf("%d reads waited for a mint or failed, and %d tokens were renewed late", waited, late)
	}
}

// withoutActiveNode kills the active node, and later two of three nodes. Standbys serve
// the tokens they have in memory and those they find in storage.
func (w *clusterWorld) withoutActiveNode(roles []string, renewing *clusterWorld) {
	w.Helper()
	standbysRead := w.cluster.Nodes[0].Product.Has(harness.StandbysRead)
	if !standbysRead {
		harness.NotTested(w, "what standbys do without an active node: Vault's standbys forward everything")
		return
	}
	want, _ := readUntilServed(w, w.clients[w.cluster.Active(w)], roles)
	for _, node := range w.cluster.Nodes {
		got, failed := readUntilServed(w, w.clients[node], roles)
		sameTokens(w, "these tests, through "+node.Address(), got, want)
		if failed != 0 {
			w.Errorf("%d reads through %s failed", failed, node.Address())
		}
	}
	asked := func() (n int) {
		for _, name := range roles {
			n += len(requestsFor(w.oauth.Requests(), name))
		}
		return n
	}
	before := asked()

	// poll reads the roles through a node one after the other, for a while. Each role's
	// reads may fail at most as often as allowed.
	poll := func(what string, node *harness.Vault, length time.Duration, allowed int) {
		w.Helper()
		failed, reads := make(map[string]int), 0
		var took []time.Duration
		var last error
		client := node.Reader(w, 20*time.Second)
		for began := time.Now(); time.Since(began) < length || reads < 2*len(roles); reads++ {
			name := roles[reads%len(roles)]
			asked := time.Now()
			got, err := readHeld(client, name)
			if err != nil {
				failed[name]++
				last = err
				continue
			}
			took = append(took, time.Since(asked))
			if got != want[name] {
				w.Errorf("%s: got another token of %s", what, name)
			}
		}
		sum := 0
		for _, n := range failed {
			sum += n
		}
		if len(took) == 0 {
			took = append(took, 0)
		}
		w.Logf("%s: %d reads, %d failed, of %d roles (%v); the others took %s (median), %s (longest)",
			what, reads, sum, len(failed), last, median(took).Round(time.Microsecond), slices.Max(took).Round(time.Millisecond))
		for name, n := range failed {
			if n > allowed {
				w.Errorf("%s: %d reads of %s failed, want at most %d: %v", what, n, name, allowed, last)
			}
		}
		if longest := slices.Max(took); longest > 2*time.Second {
			w.Errorf("%s: a read took %s", what, longest)
		}
	}

	active, standbys := w.cluster.Active(w), w.standbys()
	stop := renewing.pollThrough(standbys)
	active.Kill(w)
	for _, node := range standbys {
		poll("no active node, a standby with the tokens in memory", node, harness.NoticeDeath/4, 0)
	}
	w.cluster.Active(w) // the next one
	for _, node := range standbys {
		got, _ := readUntilServed(w, w.clients[node], roles)
		sameTokens(w, "the active node was killed, through "+node.Address(), got, want)
	}
	stop()
	w.oauth.SetFaults(oauthserver.Faults{Drop: "before"})
	w.cluster.Restart(w, active)
	for _, node := range w.cluster.Nodes {
		got, _ := readUntilServed(w, w.clients[node], roles)
		sameTokens(w, "the killed node is back, through "+node.Address(), got, want)
	}

	active, standbys = w.cluster.Active(w), w.standbys()
	last := standbys[0]
	down := []*harness.Vault{active, standbys[1]}
	for _, node := range down {
		node.Kill(w)
	}
	poll("no quorum, a standby with the tokens in memory", last, 2*harness.NoticeDeath, 0)
	last.SignalPlugin(w, pluginBinary, syscall.SIGKILL)
	harness.Eventually(w, "the plugin runs again", func() error {
		_, err := last.Logical().Read("mojoauth/status")
		return err
	})
	poll("no quorum, a standby with the tokens in storage", last, 2*time.Second, 1)

	for _, node := range down {
		node.Start(w)
	}
	w.cluster.Serve(w)
	for _, node := range w.cluster.Nodes {
		got, _ := readUntilServed(w, w.clients[node], roles)
		sameTokens(w, "there was no quorum, through "+node.Address(), got, want)
	}
	if got := asked() - before; got != 0 {
		w.Errorf("got %d requests to the OAuth server during these tests, want 0", got)
	}
}

// pollThrough reads the roles of renewalsAtStandbys through some nodes while the active node
// dies, until the returned function is called. A node forwards the first reader of each
// token, and one every 5 s once the token is due. These reads may fail, and so may those
// of a node that is just becoming active.
func (w *clusterWorld) pollThrough(nodes []*harness.Vault) (stop func()) {
	w.Helper()
	const allowed = 4
	ending := make(chan struct{})
	var polling sync.WaitGroup
	for _, node := range nodes {
		for _, name := range []string{"polled0", "polled1", "followed0", "followed1"} {
			client := node.Reader(w, 20*time.Second)
			polling.Go(func() {
				reads, failed := 0, 0
				var longest time.Duration
				var last error
				for done := false; !done; reads++ {
					select {
					case <-ending:
						done = true
					case <-time.After(200 * time.Millisecond):
					}
					began := time.Now()
					secret, err := client.Logical().Read(w.at("creds/" + name))
					if err == nil && secret == nil {
						err = errors.New("status 404")
					}
					if err != nil {
						failed, last = failed+1, err
						continue
					}
					longest = max(longest, time.Since(began))
					if expires, err := time.Parse(time.RFC3339, heldBy(secret).expiresAt); err != nil || !expires.After(began) {
						w.Errorf("%s through %s: got a token that expired at %s, %v", name, node.Address(), expires, err)
					}
				}
				w.Logf("the active node was killed, 40-second tokens, %s through %s: %d of %d reads failed (%v); the others took at most %s", name, node.Address(), failed, reads, last, longest.Round(time.Millisecond))
				if failed > allowed {
					w.Errorf("%s through %s: %d of %d reads failed, want at most %d", name, node.Address(), failed, reads, allowed)
				}
			})
		}
	}
	return func() {
		close(ending)
		polling.Wait()
	}
}

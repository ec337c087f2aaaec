// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/oauthserver"
)

// What the gate between a config and its token endpoint means for readers and for the
// endpoint. The tests assert counts exactly. They log times, and assert them generously,
// because other programs may be using the machine.

// defaultPace is the default of max_requests_per_second.
const defaultPace = 20

// coldRoles writes n roles of a config that have not been read, and returns their names.
func (w *world) coldRoles(n int, prefix, config string) (names []string) {
	w.Helper()
	for i := range n {
		name := fmt.Sprintf("%s%d", prefix, i)
		// The extra field shows the endpoint which role a request is for.
		w.write("roles/"+name, role(map[string]any{"config": config, "extra_params": map[string]any{"role": name}}))
		names = append(names, name)
	}
	return names
}

// requestsFor returns those of the requests that are for a role of coldRoles.
func requestsFor(requests []oauthserver.Request, role string) (its []oauthserver.Request) {
	for _, request := range requests {
		if form, err := url.ParseQuery(request.Body); err == nil && form.Get("role") == role {
			its = append(its, request)
		}
	}
	return its
}

// storm is the outcome of many readers of cold roles.
type storm struct {
	took   time.Duration // until the last one got its token
	failed int           // reads that were retried
}

// storm reads all roles concurrently. Each reader tries again after a second if the
// response is a 429 or a 5xx, until it gets a token.
func (w *world) storm(client *api.Client, roles []string, patience time.Duration) (s storm) {
	w.Helper()
	var failed atomic.Int64
	var readers sync.WaitGroup
	began := time.Now()
	for _, role := range roles {
		readers.Go(func() {
			for {
				_, err := client.Logical().Read("mojoauth/creds/" + role)
				var answer *api.ResponseError
				switch {
				case err == nil:
					return
				case !errors.As(err, &answer) || answer.StatusCode != 429 && answer.StatusCode < 500:
					w.Errorf("%s: %v", role, err)
					return
				case time.Since(began) > patience:
					w.Errorf("%s: no token within %s: %v", role, patience, err)
					return
				}
				failed.Add(1)
				time.Sleep(time.Second)
			}
		})
	}
	readers.Wait()
	return storm{time.Since(began), int(failed.Load())}
}

// latencies reads a path repeatedly until stop is closed, and returns how long each read
// took.
func (w *world) latencies(client *api.Client, path string, stop <-chan struct{}) (all []time.Duration) {
	w.Helper()
	for {
		select {
		case <-stop:
			return all
		case <-time.After(2 * time.Millisecond):
		}
		began := time.Now()
		if _, err := client.Logical().Read(path); err != nil {
			w.Errorf("%s: %v", path, err)
			return all
		}
		all = append(all, time.Since(began))
	}
}

// metric returns the value of a series, by its name and labels as in the text format.
func (w *world) metric(series string) float64 {
	w.Helper()
	for line := range strings.Lines(w.scrape()) {
		if value, ok := strings.CutPrefix(line, series+" "); ok {
			f, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			if err != nil {
				w.Fatalf("%s: %v", line, err)
			}
			return f
		}
	}
	w.Errorf("the metrics do not have %s", series)
	return -1
}

// configStatus returns a config's part of status.
func (w *world) configStatus(name string) map[string]any {
	w.Helper()
	config, ok := w.read("status").Data["configs"].(map[string]any)[name].(map[string]any)
	if !ok {
		w.Fatalf("status has no config %q", name)
	}
	return config
}

// accounts compares the engine's figures for a config's requests with the endpoint's.
func (w *world) accounts(config string, limit int, requests []oauthserver.Request) {
	w.Helper()
	peak, refused := oauthserver.Peak(requests), oauthserver.Refused(requests)
	label := fmt.Sprintf("{config=%q", config)
	for result, want := range map[string]int{"answered": len(requests) - refused, "throttled": refused, "no_answer": 0} {
		if got := w.metric("mojoauth_requests_total" + label + fmt.Sprintf(",result=%q}", result)); got != float64(want) {
			w.Errorf("the metrics count %.0f requests %s, the endpoint %d", got, result, want)
		}
	}
	status := w.configStatus(config)
	for name, key := range map[string]string{
		"mojoauth_peak_requests_per_second":           "peak_requests_per_second",
		"mojoauth_peak_requests_per_second_last_hour": "peak_requests_per_second_last_hour",
	} {
		got := w.metric(name + label + "}")
		if got > float64(limit) || got < float64(peak-1) || got > float64(peak+2) {
			w.Errorf("got %s %.0f; the endpoint saw %d in a second, and the limit is %d", name, got, peak, limit)
		}
		if reported := number(w, status[key]); float64(reported) != got {
			w.Errorf("status has %s %d, the metrics %.0f", key, reported, got)
		}
	}
	if got := w.metric("mojoauth_requests_waiting" + label + "}"); got != 0 || number(w, status["requests_waiting"]) != 0 {
		w.Errorf("got %.0f waiting requests in the metrics, %v in status, want none", got, status["requests_waiting"])
	}
	if got := w.metric("mojoauth_requests_per_second_limit" + label + "}"); got != float64(limit) {
		w.Errorf("got a limit of %.0f in the metrics, want %d", got, limit)
	}
	pace := w.metric("mojoauth_requests_per_second" + label + "}")
	if reported, err := strconv.ParseFloat(fmt.Sprint(status["requests_per_second"]), 64); err != nil || pace <= 0 || pace > float64(limit) || reported < pace-0.1 || reported > pace+0.1 {
		w.Errorf("got a pace of %v in the metrics and %v in status, with a limit of %d", pace, status["requests_per_second"], limit)
	}
}

// Not parallel, because it measures when requests arrive.
func TestManyColdRolesMakeNoPeak(t *testing.T) {
	harness.Once(t)
	const roles = 300
	w := newWorldIn(t, harness.StartQuietVault(t, vaultBinary, pluginDir))
	w.write("config", w.config(map[string]any{"verify_connection": false}))
	if got := number(w, w.read("config").Data["max_requests_per_second"]); got != defaultPace {
		t.Errorf("got a default max_requests_per_second of %d, want %d", got, defaultPace)
	}
	w.write("roles/warm", role(nil))
	w.token("warm")
	cold := w.coldRoles(roles, "cold", "default")
	client := w.reader(roles + 1)

	measure := func() (stop func() time.Duration) {
		ending, ended := make(chan struct{}), make(chan time.Duration)
		go func() { ended <- median(append(w.latencies(client, "mojoauth/creds/warm", ending), 0)) }()
		return func() time.Duration {
			close(ending)
			return <-ended
		}
	}
	stop := measure()
	time.Sleep(5 * time.Second)
	before := stop()
	stop = measure()
	stormed := w.storm(client, cold, 2*time.Minute)
	during := stop()

	requests := w.oauth.Requests()
	peak := oauthserver.Peak(requests)
	ratio := float64(during) / float64(before)
	t.Logf("%d cold roles: all had tokens after %s, %d reads were retried; at most %d requests in a second; a cached read took %s before and %s during that (medians): %.2f times as long",
		roles, stormed.took.Round(10*time.Millisecond), stormed.failed, peak, before, during, ratio)
	if want := roles + 1; len(requests) != want { // and the warm role
		t.Errorf("got %d requests for %d roles", len(requests), want)
	}
	if peak > defaultPace {
		t.Errorf("got %d requests in one second, want at most %d", peak, defaultPace)
	}
	if stormed.took > time.Minute {
		t.Errorf("the last role got a token after %s, want at most 25 s on an idle machine", stormed.took)
	}
	if ratio > 5 {
		t.Errorf("a cached read took %.1f times as long in the meantime, want at most twice on an idle machine", ratio)
	}
	w.accounts("default", defaultPace, requests)
}

func TestManyColdRolesAtAnEndpointThatThrottles(t *testing.T) {
	harness.Once(t)
	const (
		roles   = 200
		allowed = 5 // a second
	)
	for name, retryAfter := range map[string]int{"without Retry-After": 0, "with a Retry-After of 1 s": 1} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.write("config", w.config(map[string]any{"verify_connection": false}))
			cold := w.coldRoles(roles, "cold", "default")
			w.oauth.SetFaults(oauthserver.Faults{RateLimit: allowed, RetryAfter: retryAfter})
			stormed := w.storm(w.reader(roles), cold, 3*time.Minute)

			requests := w.oauth.Requests()
			refused := oauthserver.Refused(requests)
			t.Logf("%d cold roles, %d a second: all had tokens after %s, %d reads were retried; %d requests, %d of them throttled (%.1f %%), at most %d in a second",
				roles, allowed, stormed.took.Round(100*time.Millisecond), stormed.failed,
				len(requests), refused, 100*float64(refused)/float64(len(requests)), oauthserver.Peak(requests))
			if got := len(requests) - refused; got != roles {
				t.Errorf("%d requests were granted, want %d: one per role", got, roles)
			}
			if refused*10 > len(requests) {
				t.Errorf("%d of %d requests were throttled, want at most a tenth", refused, len(requests))
			}
			if refused == 0 {
				t.Error("no request was throttled: the test shows nothing")
			}
			if stormed.took > 2*time.Minute {
				t.Errorf("the last role got a token after %s, want at most a minute on an idle machine", stormed.took)
			}
			w.accounts("default", defaultPace, requests)

			// Throttling is not an outage.
			status := w.configStatus("default")
			for _, key := range []string{"last_error", "last_error_class", "last_error_at"} {
				if got, ok := status[key]; ok {
					t.Errorf("got %s %v in status", key, got)
				}
			}
			if got := w.metric(`mojoauth_config_in_backoff{config="default"}`); got != 0 {
				t.Error("the config is in a back-off")
			}
			w.noCanary()
		})
	}
}

// delays reads roles without a token one after the other, and returns how long each read
// took.
func (w *world) delays(client *api.Client, roles []string) (all []time.Duration) {
	w.Helper()
	for _, role := range roles {
		began := time.Now()
		if _, err := client.Logical().Read("mojoauth/creds/" + role); err != nil {
			w.Errorf("%s: %v", role, err)
		}
		all = append(all, time.Since(began).Round(time.Millisecond))
		time.Sleep(200 * time.Millisecond)
	}
	return all
}

// loop calls do repeatedly in goroutines until stop is called, which returns the number
// of calls.
func loop(goroutines int, do func(n int64)) (stop func() int64) {
	var count atomic.Int64
	ending := make(chan struct{})
	var working sync.WaitGroup
	for range goroutines {
		working.Go(func() {
			for {
				select {
				case <-ending:
					return
				default:
					do(count.Add(1))
				}
			}
		})
	}
	return func() int64 {
		close(ending)
		working.Wait()
		return count.Load()
	}
}

// Neither a caller that reads many subsets of a role's scopes nor one that rotates a role
// in a loop delays the reads of others. Not parallel, because it measures delays.
func TestGreedyCallersDelayNoOthers(t *testing.T) {
	harness.Once(t)
	const (
		allowed = time.Second
		slow    = 2 * time.Second // more, for a busy machine
	)
	t.Run("reading many subsets", func(t *testing.T) {
		w := newWorld(t)
		const scopes = 12
		greedy := demoClient(clientID, canary)
		var all []string
		for i := range scopes {
			all = append(all, fmt.Sprintf("scope%d", i))
		}
		greedy.Scopes = append(greedy.Scopes, all...)
		if err := w.oauth.SetClient(greedy); err != nil {
			t.Fatal(err)
		}
		w.write("config", w.config(nil))
		w.write("roles/greedy", role(map[string]any{"scopes": strings.Join(all, " ")}))
		others := w.coldRoles(10, "other", "default")
		client := w.reader(80)

		var served, refused atomic.Int64
		stop := loop(64, func(n int64) {
			var subset []string
			for i, scope := range all {
				if n&(1<<i) != 0 {
					subset = append(subset, scope)
				}
			}
			_, err := client.Logical().ReadWithData("mojoauth/creds/greedy", map[string][]string{"scopes": {strings.Join(subset, ",")}})
			if err != nil {
				refused.Add(1)
				return
			}
			served.Add(1)
		})
		time.Sleep(2 * time.Second)
		its := w.delays(client, []string{"greedy"}) // all its scopes
		delays := w.delays(client, others)
		waiting := number(w, w.configStatus("default")["requests_waiting"])
		reads := stop()
		t.Logf("%d reads of subsets (%d succeeded, %d failed) during other reads: cold reads of other roles took %v, of all the role's scopes %v; %d waiting at the end",
			reads, served.Load(), refused.Load(), delays, its, waiting)
		if got := slices.Max(append(delays, its...)); got > allowed+slow {
			t.Errorf("a read was delayed by %s, want less than %s", got, allowed)
		}
		if got := median(append(delays, its...)); got > allowed {
			t.Errorf("reads were delayed by %s (median), want less than %s", got, allowed)
		}
		if waiting == 0 {
			t.Error("no request was waiting at the end: the test shows nothing")
		}
		if peak := oauthserver.Peak(w.oauth.Requests()); peak > defaultPace+1 { // arrivals vary on a busy machine
			t.Errorf("got %d requests in one second, want at most %d", peak, defaultPace)
		}
	})

	t.Run("rotating in a loop", func(t *testing.T) {
		w := newWorld(t)
		w.write("config", w.config(nil))
		w.coldRoles(1, "rotated", "default")
		others := w.coldRoles(10, "other", "default")
		client := w.reader(20)
		stop := loop(8, func(int64) { _, _ = client.Logical().Write("mojoauth/rotate-role/rotated0", nil) })
		time.Sleep(2 * time.Second)
		delays := w.delays(client, others)
		rotations := stop()
		t.Logf("%d rotations were requested and %d made, while cold reads of other roles took %v", rotations, len(requestsFor(w.oauth.Requests(), "rotated0")), delays)
		if got := slices.Max(delays); got > allowed+slow {
			t.Errorf("a read was delayed by %s, want less than %s", got, allowed)
		}
		if got := median(delays); got > allowed {
			t.Errorf("reads were delayed by %s (median), want less than %s", got, allowed)
		}
	})

	t.Run("rotating in a loop, at one request a second", func(t *testing.T) {
		w := newWorld(t)
		w.write("config", w.config(map[string]any{"max_requests_per_second": 1, "request_timeout": "30s", "verify_connection": false}))
		w.coldRoles(1, "rotated", "default")
		others := w.coldRoles(9, "other", "default")
		client := w.reader(20)
		stop := loop(8, func(int64) { _, _ = client.Logical().Write("mojoauth/rotate-role/rotated0", nil) })
		harness.Eventually(t, "rotations", func() error {
			if len(w.oauth.Requests()) < 2 {
				return errors.New("fewer than two")
			}
			return nil
		})
		before := len(w.oauth.Requests())
		stormed := w.storm(client, others, time.Minute)
		requests := w.oauth.Requests()[before:]
		stop()
		rotations := len(requestsFor(requests, "rotated0"))
		t.Logf("%d cold roles at one request a second: all had tokens after %s, %d reads were retried, with %d rotations in between", len(others), stormed.took.Round(100*time.Millisecond), stormed.failed, rotations)
		if stormed.failed != 0 {
			t.Errorf("%d reads got no turn, want 0", stormed.failed)
		}
		// Every fourth request, and one more before the readers arrive.
		if most := len(others)/3 + 2; rotations == 0 || rotations > most {
			t.Errorf("got %d rotations with %d reads, want 1 to %d", rotations, len(others), most)
		}
	})
}

// What a reader gets if there is no turn in time.
func TestNoTurnInTime(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	config := func(name string, more map[string]any) {
		t.Helper()
		more["verify_connection"] = false
		w.write("config/"+name, w.config(more))
	}
	read := func(path string) (secret *api.Secret, took time.Duration, err error) {
		began := time.Now()
		secret, err = w.vault.Logical().Read("mojoauth/" + path)
		return secret, time.Since(began), err
	}

	// Too many requests for the pace, while MojoAuth works.
	config("narrow", map[string]any{"max_requests_per_second": 1, "request_timeout": "2s"})
	roles := w.coldRoles(12, "narrow", "narrow")
	var served, turnedAway atomic.Int64
	var readers sync.WaitGroup
	for _, role := range roles {
		readers.Go(func() {
			_, took, err := read("creds/" + role)
			if err == nil {
				served.Add(1)
				return
			}
			turnedAway.Add(1)
			w.wantError(err, 429, fmt.Sprintf("role %q", role), `config "narrow"`, "waiting", "pace 1 per second", "Try again in ")
			if strings.Contains(err.Error(), "HTTP 429") || strings.Contains(err.Error(), "throttling") {
				t.Errorf("the error says that MojoAuth throttles, which it does not: %v", err)
			}
			if took < 2*time.Second || took > 5*time.Second {
				t.Errorf("a read that got no turn took %s, with a request_timeout of 2s", took)
			}
		})
	}
	readers.Wait()
	if served.Load() < 2 || turnedAway.Load() < 6 {
		t.Errorf("got %d tokens and %d errors, at one request a second within 3 s", served.Load(), turnedAway.Load())
	}

	// MojoAuth throttles.
	w.oauth.SetLifetime(21 * time.Second) // the server rounds down
	config("throttled", map[string]any{"request_timeout": "2s"})
	w.coldRoles(2, "throttled", "throttled")
	w.write("roles/due", role(map[string]any{"config": "throttled", "min_ttl": "16s", "extra_params": map[string]any{"role": "due"}}))
	held := w.read("creds/due")
	w.oauth.SetFaults(oauthserver.Faults{Status: 429})
	before := len(w.oauth.Requests())
	_, took, err := read("creds/throttled0")
	w.wantError(err, 429, `role "throttled0"`, `config "throttled"`, "waiting", "per second", "HTTP 429", "Try again in ")
	if took < 2*time.Second || took > 5*time.Second {
		t.Errorf("a read from a throttling endpoint took %s, with a request_timeout of 2s", took)
	}
	if got := len(w.oauth.Requests()) - before; got < 1 || got > 8 {
		t.Errorf("got %d requests in %s to an endpoint that answers each with 429", got, took)
	}
	_, err = w.vault.Logical().Write("mojoauth/rotate-role/due", nil)
	w.wantError(err, 429, `role "due"`, `config "throttled"`, "HTTP 429", "Try again in ")
	if got, ok := w.configStatus("throttled")["last_error"]; ok {
		t.Errorf("got the error %v in status for an endpoint that only throttles", got)
	}
	// A token that is due is usable.
	var due *api.Secret
	harness.EventuallyWithin(t, 12*time.Second, "the cached token comes with a warning", func() (err error) {
		if due, _, err = read("creds/due"); err == nil && len(due.Warnings) == 0 {
			err = errors.New("no warning")
		}
		return err
	})
	if due.Data["access_token"] != held.Data["access_token"] {
		t.Error("got another token")
	}
	t.Logf("the warning of a token that is due: %q", due.Warnings)
	if text := strings.Join(due.Warnings, " "); !strings.Contains(text, "min_ttl of 16s") {
		t.Errorf("got the warnings %q", due.Warnings)
	}

	// If a Retry-After is longer than any read can wait, every reader gets the error
	// immediately.
	w.oauth.SetFaults(oauthserver.Faults{Status: 429, Header: map[string]string{"Retry-After": "600"}})
	config("closed", map[string]any{"request_timeout": "60s"})
	w.coldRoles(3, "closed", "closed")
	before = len(w.oauth.Requests())
	for _, role := range []string{"closed0", "closed1", "closed0"} {
		_, took, err := read("creds/" + role)
		w.wantError(err, 429, fmt.Sprintf("role %q", role), `config "closed"`, "Retry-After", "HTTP 429", "Try again in ")
		if took > 5*time.Second {
			t.Errorf("a read took %s, want an immediate response", took)
		}
		t.Logf("within %s: %v", took.Round(time.Millisecond), err)
	}
	_, err = w.vault.Logical().Write("mojoauth/rotate-role/closed2", nil)
	w.wantError(err, 429, `role "closed2"`, "Try again in ")
	_, err = w.vault.Logical().Write("mojoauth/config/closed", map[string]any{"max_retries": 1})
	w.wantError(err, 400, `config "closed" was not saved`, "verify_connection=false")
	w.write("config/closed", map[string]any{"max_retries": 1, "verify_connection": false})
	_, _, err = read("creds/closed2")
	w.wantError(err, 429, "Try again in ")
	// The other config's gate may still send a renewal of its due token.
	sent := w.oauth.Requests()[before:]
	if got := len(sent) - len(requestsFor(sent, "due")); got != 1 {
		t.Errorf("got %d requests to an endpoint that asked for ten minutes, want 1", got)
	}
	// Another endpoint has sent no Retry-After.
	w.oauth.SetFaults(oauthserver.Faults{})
	config("closed", map[string]any{"token_url": w.oauth.TokenURL() + "?env=test"})
	w.token("closed2")
	w.noCanary()
}

// A server passes on the engine's Retry-After if the mount's tuning allows it, and
// Vault's client obeys it.
func TestRetryAfterOfTheEngine(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.write("config", w.config(map[string]any{"verify_connection": false}))
	w.coldRoles(1, "app", "default")
	w.oauth.SetFaults(oauthserver.Faults{Status: 429, Header: map[string]string{"Retry-After": "600"}})
	header := func() []string {
		t.Helper()
		req, err := http.NewRequest(http.MethodGet, w.vault.Address()+"/v1/mojoauth/creds/app0", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("X-Vault-Token", w.vault.Token())
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != 429 {
			t.Errorf("got status %d, want 429", resp.StatusCode)
		}
		return resp.Header["Retry-After"]
	}
	if got := header(); len(got) != 0 {
		t.Errorf("on an untuned mount: got Retry-After %q, want none", got)
	}

	// Without the header the client tries twice more, after one to two seconds each.
	var requests atomic.Int64
	config := api.DefaultConfig()
	config.Address = w.vault.Address()
	transport := config.HttpClient.Transport
	config.HttpClient.Transport = roundTripper(func(req *http.Request) (*http.Response, error) {
		requests.Add(1)
		return transport.RoundTrip(req)
	})
	client, err := api.NewClient(config)
	if err != nil {
		t.Fatal(err)
	}
	client.SetToken(w.vault.Token())
	began := time.Now()
	_, err = client.Logical().Read("mojoauth/creds/app0")
	w.wantError(err, 429, "Try again in ")
	t.Logf("Vault's client made %d requests in %s", requests.Load(), time.Since(began).Round(10*time.Millisecond))
	if got := requests.Load(); got != 3 {
		t.Errorf("Vault's client made %d requests, want it to retry a 429 twice", got)
	}

	if err := w.vault.Sys().TuneMountAllowNil("mojoauth", api.TuneMountConfigInput{AllowedResponseHeaders: &[]string{"Retry-After"}}); err != nil {
		t.Fatal(err)
	}
	got := header()
	if len(got) != 1 {
		t.Fatalf("on a tuned mount: got Retry-After %q, want one", got)
	}
	if got[0] != "30" { // the most that the engine sends, so no client waits longer than its own limit
		t.Errorf("on a tuned mount: got Retry-After %q, want 30", got[0])
	}
	// With the header it waits that long, or as long as it may: a minute by default.
	requests.Store(0)
	client.SetClientTimeout(3 * time.Second)
	if _, err = client.Logical().Read("mojoauth/creds/app0"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Vault's client did not wait for the Retry-After: %v", err)
	}
	if got := requests.Load(); got != 1 {
		t.Errorf("Vault's client made %d requests in 3 s, want 1", got)
	}
}

// roundTripper makes a function an http.RoundTripper.
type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(req *http.Request) (*http.Response, error) { return f(req) }

// A write of max_requests_per_second applies to requests that are already waiting, and
// does not make their reads fail.
func TestLimitAppliesImmediately(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.write("config", w.config(map[string]any{"max_requests_per_second": 10, "request_timeout": "60s", "verify_connection": false}))
	cold := w.coldRoles(200, "cold", "default")
	client := w.reader(len(cold))
	ended := make(chan storm, 1)
	go func() { ended <- w.storm(client, cold, 3*time.Minute) }()
	waitFor := func(requests int) {
		t.Helper()
		harness.Eventually(t, fmt.Sprintf("%d requests", requests), func() error {
			if got := len(w.oauth.Requests()); got < requests {
				return fmt.Errorf("%d so far", got)
			}
			return nil
		})
	}
	limit := func(n int) (before int) {
		t.Helper()
		w.write("config", map[string]any{"max_requests_per_second": n, "verify_connection": false})
		time.Sleep(100 * time.Millisecond) // for requests that had already left
		return len(w.oauth.Requests())
	}
	waitFor(40)
	lowered := limit(2)
	time.Sleep(5 * time.Second)
	requests := w.oauth.Requests()[lowered:]
	peak := oauthserver.Peak(requests)
	t.Logf("lowered from 10 to 2: %d requests in the next 5 s, at most %d in a second", len(requests), peak)
	if peak > 2 || len(requests) < 6 || len(requests) > 11 {
		t.Errorf("after the limit was lowered to 2, got %d requests in 5 s, and up to %d in a second", len(requests), peak)
	}
	raised := limit(1000)
	began := time.Now()
	stormed := <-ended
	requests = w.oauth.Requests()[raised:]
	t.Logf("raised to 1000: the other %d took %s, at most %d in a second", len(requests), time.Since(began).Round(10*time.Millisecond), oauthserver.Peak(requests))
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("after the limit was raised, the other %d requests took %s", len(requests), took)
	}
	if oauthserver.Peak(requests) <= 10 {
		t.Error("after the limit was raised, requests were no faster than before")
	}
	if stormed.failed != 0 {
		t.Errorf("%d reads failed while the limit changed, want 0", stormed.failed)
	}
	if got := len(w.oauth.Requests()); got != len(cold) {
		t.Errorf("got %d requests for %d roles", got, len(cold))
	}

	for _, wrong := range []any{0, -1, 1001, "fast"} {
		_, err := w.vault.Logical().Write("mojoauth/config", map[string]any{"max_requests_per_second": wrong, "verify_connection": false})
		w.wantError(err, 400, "max_requests_per_second")
	}
	if got := number(w, w.read("config").Data["max_requests_per_second"]); got != 1000 {
		t.Errorf("after refused writes: got the limit %d, want 1000", got)
	}
}

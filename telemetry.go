// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"maps"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/gate"
)

// This file counts what this node does for one mount. status and metrics tell the
// same numbers. Labels come from fixed sets, but for the names of configs:
// whoever reads tokens cannot make more of them.

// outcomes in the order of telemetry.reads.
var outcomes = [...]outcome{outcomeHit, outcomeRefreshed, outcomeMinted, outcomeRestored, outcomeForwarded, outcomeStale, outcomeError}

func (o outcome) index() int { return slices.Index(outcomes[:], o) }

// The results of a mint that gave a token, and of one that ended before its request had
// a turn at the gate; the others are errorClasses.
const (
	resultOK     = "ok"
	resultNoTurn = "no_turn"
)

// answers are what may come of a request, as its label tells.
var answers = map[gate.Answer]string{gate.Answered: "answered", gate.Throttled: "throttled", gate.NoAnswer: "no_answer"}

// results are all that a mint may have. Each is told from the start, as 0: a
// counter that begins with its first event hides that event from increase().
var results = []string{
	resultOK, resultNoTurn, string(classClientRefused), string(classRequestRefused), string(classServerError),
	string(classUnexpected), string(classTLS), string(classNetwork), string(classTimeout),
	string(classExpiredOnArrival), string(classInternal),
}

// telemetry is one node's account of one mount.
type telemetry struct {
	startedAt time.Time
	reads     [len(outcomes)]atomic.Int64
	duration  prometheus.Histogram
	// storeErrors counts failures with stored tokens, by storeOperations.
	storeErrors [len(storeOperations)]atomic.Int64

	mu      sync.Mutex       // never held across I/O
	results map[string]int64 // of all configs, those that are gone included
	configs map[string]*configTelemetry
}

// configTelemetry is the account of the mints with one config.
type configTelemetry struct {
	results    map[string]int64 // by resultOK, resultNoTurn or errorClass
	requests   map[string]int64 // by what came of them
	lastMint   time.Time
	lastError  *mintError
	lastFailed time.Time
}

func newTelemetry() *telemetry {
	return &telemetry{
		startedAt: time.Now(),
		results:   make(map[string]int64),
		configs:   make(map[string]*configTelemetry),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "mojoauth_mint_duration_seconds",
			Help:    "How long mints took from when a request left, with all further tries, whether or not they gave a token. What came before a 429 is not counted.",
			Buckets: []float64{0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 60},
		}),
	}
}

// read counts a read of creds.
func (t *telemetry) read(how outcome) { t.reads[how.index()].Add(1) }

// minted counts a mint with a config: failed is nil when it gave a token.
func (t *telemetry) minted(config string, took time.Duration, failed *mintError) {
	t.duration.Observe(took.Seconds())
	t.mu.Lock()
	defer t.mu.Unlock()
	result := resultOK
	if failed != nil {
		result = string(failed.class)
	}
	c := t.count(config, result)
	switch {
	case c == nil:
	case failed == nil:
		c.lastMint = time.Now()
	default:
		c.lastError, c.lastFailed = failed, time.Now()
	}
}

// noTurn counts a mint with a config that ended before its request had a turn.
func (t *telemetry) noTurn(config string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.count(config, resultNoTurn)
}

// count counts a mint's result, and finds the account of its config: nil when that was
// deleted while the mint was under way. The caller holds t.mu.
func (t *telemetry) count(config, result string) *configTelemetry {
	t.results[result]++
	c := t.configs[config]
	if c != nil {
		c.results[result]++
	}
	return c
}

// requested counts a request with a config by what came of it.
func (t *telemetry) requested(config string, how gate.Answer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if c := t.configs[config]; c != nil {
		c.requests[answers[how]]++
	}
}

// configSeen begins the account of a config, if there is none.
func (t *telemetry) configSeen(name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.configs[name] == nil {
		t.configs[name] = &configTelemetry{results: make(map[string]int64), requests: make(map[string]int64)}
	}
}

// knows reports whether there is an account of a config.
func (t *telemetry) knows(name string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.configs[name] != nil
}

// configGone ends the account of a config.
func (t *telemetry) configGone(name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.configs, name)
}

// total is how many mints of all configs had each result.
func (t *telemetry) total() map[string]int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return maps.Clone(t.results)
}

// snapshot is a copy of the accounts of the configs with these names.
func (t *telemetry) snapshot(names []string) map[string]configTelemetry {
	t.mu.Lock()
	defer t.mu.Unlock()
	configs := make(map[string]configTelemetry, len(names))
	for _, name := range names {
		if c := t.configs[name]; c != nil {
			copied := *c
			copied.results, copied.requests = maps.Clone(c.results), maps.Clone(c.requests)
			configs[name] = copied
		}
	}
	return configs
}

// Metrics, beside the histogram.
var (
	descBuild   = prometheus.NewDesc("mojoauth_build_info", "The plugin's version and commit; always 1.", []string{"version", "commit", "goversion"}, nil)
	descReads   = prometheus.NewDesc("mojoauth_reads_total", "Reads of creds/<role> on this node, by how they were answered.", []string{"outcome"}, nil)
	descMints   = prometheus.NewDesc("mojoauth_mints_total", "Mints, retries included in one, by config and by result: ok, no_turn for one that ended before its request had a turn at the gate, or the class of the failure.", []string{"config", "result"}, nil)
	descSent    = prometheus.NewDesc("mojoauth_requests_total", "HTTP requests to the token endpoint, retries, rotations and verifications included, by config and by result: answered, throttled (HTTP 429) or no_answer.", []string{"config", "result"}, nil)
	descWaiting = prometheus.NewDesc("mojoauth_requests_waiting", "Requests that wait for their turn at the config's gate.", []string{"config"}, nil)
	descPace    = prometheus.NewDesc("mojoauth_requests_per_second", "The pace in force: requests that may leave in a second.", []string{"config"}, nil)
	descLimit   = prometheus.NewDesc("mojoauth_requests_per_second_limit", "The config's max_requests_per_second.", []string{"config"}, nil)
	descPeak    = prometheus.NewDesc("mojoauth_peak_requests_per_second", "The highest number of requests in a second since the node began to serve the mount, or since token_url changed.", []string{"config"}, nil)
	descHour    = prometheus.NewDesc("mojoauth_peak_requests_per_second_last_hour", "The highest number of requests in a second of the last hour.", []string{"config"}, nil)
	descStore   = prometheus.NewDesc("mojoauth_token_store_errors_total", "Failures to load, save, delete or list tokens in Vault's storage.", []string{"operation"}, nil)
	descCached  = prometheus.NewDesc("mojoauth_cached_tokens", "Tokens in memory that may be served.", nil, nil)
	descDue     = prometheus.NewDesc("mojoauth_due_tokens", "Tokens in use that should have been replaced by a new one already.", nil, nil)
	descNearest = prometheus.NewDesc("mojoauth_due_token_servable_seconds", "How long the first of the due tokens may still be served. Absent when none is due.", nil, nil)
	descBackoff = prometheus.NewDesc("mojoauth_config_in_backoff", "1 while MojoAuth is not asked with this config because of a failure, else 0.", []string{"config"}, nil)
	descLast    = prometheus.NewDesc("mojoauth_config_last_mint_timestamp_seconds", "When the config last gave a token: Unix time.", []string{"config"}, nil)
)

// collector makes metrics of a mount's telemetry: prometheus.Collector.
type collector struct {
	telemetry *telemetry
	tokens    *tokenCache
	configs   []string // the names there are
}

func (c collector) Describe(out chan<- *prometheus.Desc) {
	for _, desc := range []*prometheus.Desc{
		descBuild, descReads, descMints, descSent, descWaiting, descPace, descLimit, descPeak, descHour,
		descStore, descCached, descDue, descNearest, descBackoff, descLast,
	} {
		out <- desc
	}
}

func (c collector) Collect(out chan<- prometheus.Metric) {
	gauge := func(desc *prometheus.Desc, value float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value, labels...)
	}
	counter := func(desc *prometheus.Desc, value int64, labels ...string) {
		out <- prometheus.MustNewConstMetric(desc, prometheus.CounterValue, float64(value), labels...)
	}
	gauge(descBuild, 1, runningVersion(), Commit, runtime.Version())
	for i, how := range outcomes {
		counter(descReads, c.telemetry.reads[i].Load(), string(how))
	}
	for i, operation := range storeOperations {
		counter(descStore, c.telemetry.storeErrors[i].Load(), operation)
	}
	for name, config := range c.telemetry.snapshot(c.configs) {
		for _, result := range results {
			counter(descMints, config.results[result], name, result)
		}
		for _, result := range answers {
			counter(descSent, config.requests[result], name, result)
		}
		if !config.lastMint.IsZero() {
			gauge(descLast, float64(config.lastMint.UnixMilli())/1000, name)
		}
	}
	n := c.tokens.census()
	gauge(descCached, float64(n.cached))
	gauge(descDue, float64(n.due))
	if n.due > 0 {
		gauge(descNearest, n.nearest.Seconds())
	}
	for _, name := range c.configs {
		value := 0.0
		if !n.backoff[name].IsZero() {
			value = 1
		}
		gauge(descBackoff, value, name)
		if at, ok := n.gates[name]; ok {
			gauge(descWaiting, float64(at.Waiting), name)
			gauge(descPace, at.Pace, name)
			gauge(descLimit, float64(at.Limit), name)
			gauge(descPeak, float64(at.Peak), name)
			gauge(descHour, float64(at.PeakHour), name)
		}
	}
}

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

// This file counts what this node does for one mount. status and metrics report the same
// numbers. Except for the names of configs, labels come from fixed sets, so readers of
// tokens cannot add any.

// outcomes has the outcomes in the order of telemetry.reads.
var outcomes = [...]outcome{outcomeHit, outcomeRefreshed, outcomeMinted, outcomeRestored, outcomeForwarded, outcomeStale, outcomeError}

func (o outcome) index() int { return slices.Index(outcomes[:], o) }

// The results of a mint that succeeded, and of one that ended before its request got a turn
// at the gate. The other results are errorClasses.
const (
	resultOK     = "ok"
	resultNoTurn = "no_turn"
)

// answers has the label values for the results of a token request.
var answers = map[gate.Answer]string{gate.Answered: "answered", gate.Throttled: "throttled", gate.NoAnswer: "no_answer"}

// results has all results of a mint. Metrics show each from the start, as 0: a counter that
// starts with its first event hides that event from increase().
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
	// storeErrors counts failures of token storage, by storeOperations.
	storeErrors [len(storeOperations)]atomic.Int64

	mu      sync.Mutex       // never held across I/O
	results map[string]int64 // of all configs, including deleted ones
	configs map[string]*configTelemetry
}

// configTelemetry is the account of the mints with one config.
type configTelemetry struct {
	results    map[string]int64 // by resultOK, resultNoTurn or errorClass
	requests   map[string]int64 // by result
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
			Help:    "Duration of mints, successful or not, from their first request, including retries. Time before a 429 does not count.",
			Buckets: []float64{0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 60},
		}),
	}
}

// read counts a read of creds/<role>.
func (t *telemetry) read(how outcome) { t.reads[how.index()].Add(1) }

// minted counts a mint with a config. failed is nil if it succeeded.
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

// noTurn counts a mint with a config that ended before its request got a turn.
func (t *telemetry) noTurn(config string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.count(config, resultNoTurn)
}

// count counts a mint's result, and returns the account of its config, or nil if the config
// was deleted during the mint. The caller holds t.mu.
func (t *telemetry) count(config, result string) *configTelemetry {
	t.results[result]++
	c := t.configs[config]
	if c != nil {
		c.results[result]++
	}
	return c
}

// requested counts a token request with a config by its result.
func (t *telemetry) requested(config string, how gate.Answer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if c := t.configs[config]; c != nil {
		c.requests[answers[how]]++
	}
}

// configSeen opens the account of a config, if there is none.
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

// configGone closes the account of a config.
func (t *telemetry) configGone(name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.configs, name)
}

// total returns the number of mints of all configs by result.
func (t *telemetry) total() map[string]int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return maps.Clone(t.results)
}

// snapshot returns copies of the accounts of the configs with these names.
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

// Descriptions of the metrics other than the histogram.
var (
	descBuild   = prometheus.NewDesc("mojoauth_build_info", "Version and commit of the plugin. Always 1.", []string{"version", "commit", "goversion"}, nil)
	descReads   = prometheus.NewDesc("mojoauth_reads_total", "Reads of creds/<role> on this node, by outcome.", []string{"outcome"}, nil)
	descMints   = prometheus.NewDesc("mojoauth_mints_total", "Mints by config and by result: ok, no_turn (the mint ended before its request got a turn at the gate), or the error class. A mint and its retries count as one.", []string{"config", "result"}, nil)
	descSent    = prometheus.NewDesc("mojoauth_requests_total", "HTTP requests to the token endpoint, including retries, rotations, and verifications, by config and by result: answered, throttled (HTTP 429), or no_answer.", []string{"config", "result"}, nil)
	descWaiting = prometheus.NewDesc("mojoauth_requests_waiting", "Token requests that wait for a turn at the config's gate.", []string{"config"}, nil)
	descPace    = prometheus.NewDesc("mojoauth_requests_per_second", "Current pace: the number of token requests that may leave per second.", []string{"config"}, nil)
	descLimit   = prometheus.NewDesc("mojoauth_requests_per_second_limit", "Value of the config's max_requests_per_second.", []string{"config"}, nil)
	descPeak    = prometheus.NewDesc("mojoauth_peak_requests_per_second", "Highest number of token requests in one second since the node started to serve the mount, or since token_url changed.", []string{"config"}, nil)
	descHour    = prometheus.NewDesc("mojoauth_peak_requests_per_second_last_hour", "Highest number of token requests in one second in the last hour.", []string{"config"}, nil)
	descStore   = prometheus.NewDesc("mojoauth_token_store_errors_total", "Failures to load, save, delete, or list tokens in Vault's storage.", []string{"operation"}, nil)
	descCached  = prometheus.NewDesc("mojoauth_cached_tokens", "Cached tokens that may be served.", nil, nil)
	descDue     = prometheus.NewDesc("mojoauth_due_tokens", "Tokens in use that are due for renewal.", nil, nil)
	descNearest = prometheus.NewDesc("mojoauth_due_token_servable_seconds", "Seconds until the first of the due tokens can no longer be served. Absent if no token is due.", nil, nil)
	descBackoff = prometheus.NewDesc("mojoauth_config_in_backoff", "1 while the config is in a back-off after a failure, otherwise 0.", []string{"config"}, nil)
	descLast    = prometheus.NewDesc("mojoauth_config_last_mint_timestamp_seconds", "When a token was last minted with the config, as Unix time.", []string{"config"}, nil)
)

// collector exposes a mount's telemetry as metrics. It is a prometheus.Collector.
type collector struct {
	telemetry *telemetry
	tokens    *tokenCache
	configs   []string // names of the existing configs
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

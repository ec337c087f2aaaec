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
)

// This file counts what this node does for one mount. status and metrics tell the
// same numbers. Labels come from fixed sets, but for the names of configs:
// whoever reads tokens cannot make more of them.

// outcomes in the order of telemetry.reads.
var outcomes = [...]outcome{outcomeHit, outcomeRefreshed, outcomeMinted, outcomeStale, outcomeError}

func (o outcome) index() int { return slices.Index(outcomes[:], o) }

// resultOK is the result of a mint that gave a token; the others are errorClasses.
const resultOK = "ok"

// results are all that a mint may have. Each is told from the start, as 0: a
// counter that begins with its first event hides that event from increase().
var results = []string{
	resultOK, string(classClientRefused), string(classRequestRefused), string(classThrottled), string(classServerError),
	string(classUnexpected), string(classExpiredOnArrival), string(classTLS), string(classNetwork), string(classTimeout),
}

// telemetry is one node's account of one mount.
type telemetry struct {
	startedAt time.Time
	reads     [len(outcomes)]atomic.Int64
	duration  prometheus.Histogram

	mu      sync.Mutex       // never held across I/O
	results map[string]int64 // of all configs, those that are gone included
	configs map[string]*configTelemetry
}

// configTelemetry is the account of the mints with one config.
type configTelemetry struct {
	results    map[string]int64 // by resultOK or errorClass
	lastMint   time.Time
	lastError  *mintError
	lastFailed time.Time
	touched    time.Time // when the config was last written or minted with
}

func newTelemetry() *telemetry {
	return &telemetry{
		startedAt: time.Now(),
		results:   make(map[string]int64),
		configs:   make(map[string]*configTelemetry),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "mojoauth_mint_duration_seconds",
			Help:    "How long mints took, with all their tries, whether or not they gave a token.",
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
	c := t.config(config)
	result := resultOK
	if failed == nil {
		c.lastMint = time.Now()
	} else {
		result = string(failed.class)
		c.lastError, c.lastFailed = failed, time.Now()
	}
	c.results[result]++
	t.results[result]++
}

// configSeen begins the account of a config.
func (t *telemetry) configSeen(name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.config(name)
}

// config finds or begins the account of a config. The caller holds t.mu.
func (t *telemetry) config(name string) *configTelemetry {
	c := t.configs[name]
	if c == nil {
		c = &configTelemetry{results: make(map[string]int64)}
		t.configs[name] = c
	}
	c.touched = time.Now()
	return c
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

// snapshot is a copy of the accounts of the configs with these names. Others were
// deleted on another node, and are forgotten; but not at once, since a config may have
// been written after the names were listed.
func (t *telemetry) snapshot(names []string) map[string]configTelemetry {
	t.mu.Lock()
	defer t.mu.Unlock()
	configs := make(map[string]configTelemetry, len(names))
	for name, c := range t.configs {
		switch {
		case slices.Contains(names, name):
			copied := *c
			copied.results = maps.Clone(c.results)
			configs[name] = copied
		case time.Since(c.touched) > time.Minute:
			delete(t.configs, name)
		}
	}
	return configs
}

// census is what the cache holds at one moment.
type census struct {
	cached int // tokens that may be served
	// due counts the tokens in use for which a new one is due and not there, and
	// nearest is how long the first of them may still be served.
	due     int
	nearest time.Duration
	// backoff has the configs that are in a back-off, and until when.
	backoff map[string]time.Time
}

// census counts what the cache holds.
func (c *tokenCache) census() census {
	now := time.Now()
	n := census{backoff: make(map[string]time.Time)}
	c.mu.RLock()
	applications := maps.Clone(c.applications)
	c.mu.RUnlock()
	for _, s := range c.all() {
		st := s.state.Load()
		if st == nil || st.token == nil {
			continue
		}
		left := st.token.left(now)
		switch st.token.schedule.phase(left) {
		case phaseSpent:
			continue
		case phaseDue:
			if st.token.read.Load() {
				servable := left - st.token.schedule.floor
				if n.due == 0 || servable < n.nearest {
					n.nearest = servable
				}
				n.due++
			}
		}
		n.cached++
	}
	for name, app := range applications {
		app.mu.Lock()
		if app.backoff.blocks(now) {
			n.backoff[name] = app.backoff.until
		}
		app.mu.Unlock()
	}
	return n
}

// Metrics, beside the histogram.
var (
	descBuild   = prometheus.NewDesc("mojoauth_build_info", "The plugin's version and commit; always 1.", []string{"version", "commit", "goversion"}, nil)
	descReads   = prometheus.NewDesc("mojoauth_reads_total", "Reads of creds/<role> on this node, by how they were answered.", []string{"outcome"}, nil)
	descMints   = prometheus.NewDesc("mojoauth_mints_total", "Requests for a token to MojoAuth, retries included in one, by config and by result: ok or the class of the failure.", []string{"config", "result"}, nil)
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
	for _, desc := range []*prometheus.Desc{descBuild, descReads, descMints, descCached, descDue, descNearest, descBackoff, descLast} {
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
	for name, config := range c.telemetry.snapshot(c.configs) {
		for _, result := range results {
			counter(descMints, config.results[result], name, result)
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
	}
}

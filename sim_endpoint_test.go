// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"weak"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/gate"
)

// This file is the token endpoint of a simulation, below the engine's HTTP client. It
// produces faults and remembers the truth about each token it issued.

// simConcern says whom a failure concerns.
type simConcern int

const (
	concernsNobody simConcern = iota
	concernsKey
	concernsConfig
)

// simOutcome is how a token request ends.
type simOutcome struct {
	name     string
	status   int // 0: no answer
	oauth    string
	body     string // instead of one made of oauth
	location string
	hang     bool // no answer before the client gives up
	silent   bool // the body of the answer never ends, whatever the client does
	drip     bool // the body of the answer comes byte by byte
	broken   bool // the body of the answer breaks off

	concern simConcern
	class   errorClass
	again   bool // the same mint may retry

	throttled  bool // the request returns to its place at the gate
	retryAfter bool // the answer has a Retry-After
	after      time.Duration

	latency time.Duration
}

func (o simOutcome) failed() bool { return o.concern != concernsNobody }

// simOutcomes says what an endpoint may do and how the engine must take it.
var simOutcomes = map[string]simOutcome{
	"token":          {status: 200},
	"500":            {status: 500, concern: concernsConfig, class: classServerError, again: true},
	"502":            {status: 502, concern: concernsConfig, class: classServerError, again: true, body: "<html>bad gateway</html>"},
	"503":            {status: 503, concern: concernsConfig, class: classServerError, again: true},
	"503 after":      {status: 503, concern: concernsConfig, class: classServerError, again: true, retryAfter: true},
	"429":            {status: 429, concern: concernsKey, class: classThrottled, throttled: true},
	"429 after":      {status: 429, concern: concernsKey, class: classThrottled, throttled: true, retryAfter: true},
	"504":            {status: 504, concern: concernsConfig, class: classServerError, again: true},
	"501":            {status: 501, concern: concernsConfig, class: classServerError},
	"401":            {status: 401, oauth: "invalid_client", concern: concernsConfig, class: classClientRefused},
	"400 client":     {status: 400, oauth: "unauthorized_client", concern: concernsConfig, class: classClientRefused},
	"403":            {status: 403, concern: concernsConfig, class: classClientRefused},
	"404":            {status: 404, concern: concernsConfig, class: classClientRefused, body: "not found"},
	"400 scope":      {status: 400, oauth: "invalid_scope", concern: concernsKey, class: classRequestRefused},
	"400 target":     {status: 400, oauth: "invalid_target", concern: concernsKey, class: classRequestRefused},
	"400":            {status: 400, concern: concernsKey, class: classRequestRefused},
	"403 denied":     {status: 403, oauth: "access_denied", concern: concernsKey, class: classRequestRefused},
	"413":            {status: 413, concern: concernsKey, class: classRequestRefused, body: "too large"},
	"422":            {status: 422, concern: concernsKey, class: classRequestRefused},
	"302":            {status: 302, location: "https://elsewhere.example/", concern: concernsConfig, class: classUnexpected},
	"garbage":        {status: 200, body: "<html>hello</html>", concern: concernsConfig, class: classUnexpected},
	"no token":       {status: 200, body: `{"expires_in":3600}`, concern: concernsConfig, class: classUnexpected},
	"ended":          {status: 200, concern: concernsKey, class: classExpiredOnArrival},
	"200 with error": {status: 200, oauth: "invalid_scope", concern: concernsKey, class: classRequestRefused},
	"unreachable":    {concern: concernsConfig, class: classNetwork, again: true},
	"broken":         {status: 200, broken: true, body: `{"access_tok`, concern: concernsConfig, class: classNetwork, again: true},
	"hang":           {hang: true, concern: concernsConfig, class: classTimeout},
	"drip":           {status: 200, drip: true, concern: concernsConfig, class: classTimeout},
	"silent":         {status: 101, silent: true, concern: concernsConfig, class: classTimeout},
}

// simWeather is how an endpoint behaves for a while.
type simWeather struct {
	name             string
	fastest, longest time.Duration      // latency
	odds             map[string]float64 // of outcomes; the rest are tokens
	only             bool               // odds apply to the requests of one role only
}

var simWeathers = []simWeather{
	{name: "fair", fastest: 20 * time.Millisecond, longest: 300 * time.Millisecond},
	{name: "slow", fastest: 300 * time.Millisecond, longest: 6 * time.Second},
	{name: "very slow", fastest: 2 * time.Second, longest: 25 * time.Second, odds: map[string]float64{"hang": 0.1, "drip": 0.1}},
	{name: "flaky", fastest: 20 * time.Millisecond, longest: 2 * time.Second, odds: map[string]float64{"500": 0.1, "503": 0.1, "unreachable": 0.1, "broken": 0.1, "502": 0.05}},
	{name: "down", longest: time.Second, odds: map[string]float64{"503": 0.7, "500": 0.2, "501": 0.1}},
	{name: "down fast", longest: 30 * time.Millisecond, odds: map[string]float64{"503": 0.6, "unreachable": 0.4}},
	{name: "unreachable", longest: 100 * time.Millisecond, odds: map[string]float64{"unreachable": 1}},
	{name: "hanging", fastest: 20 * time.Millisecond, longest: time.Second, odds: map[string]float64{"hang": 1}},
	{name: "hanging at times", fastest: 20 * time.Millisecond, longest: time.Second, odds: map[string]float64{"hang": 0.3}},
	{name: "silent", fastest: 20 * time.Millisecond, longest: time.Second, odds: map[string]float64{"silent": 0.5}},
	{name: "nonsense", fastest: 20 * time.Millisecond, longest: time.Second, odds: map[string]float64{"garbage": 0.3, "no token": 0.2, "302": 0.2, "404": 0.1, "ended": 0.1}},
	{name: "locked out", fastest: 20 * time.Millisecond, longest: time.Second, odds: map[string]float64{"401": 0.5, "400 client": 0.2, "403": 0.2}},
	{name: "one role refused", fastest: 20 * time.Millisecond, longest: time.Second, only: true, odds: map[string]float64{"400 scope": 0.3, "400 target": 0.2, "400": 0.1, "403 denied": 0.1, "200 with error": 0.1, "413": 0.1, "422": 0.1}},
	{name: "one role fails", fastest: 20 * time.Millisecond, longest: time.Second, only: true, odds: map[string]float64{"500": 0.3, "403": 0.4, "hang": 0.1, "garbage": 0.1}},
	{name: "throttling", fastest: 20 * time.Millisecond, longest: time.Second, odds: map[string]float64{"429": 0.4, "429 after": 0.1}},
	{name: "throttling all", fastest: 20 * time.Millisecond, longest: time.Second, odds: map[string]float64{"429": 1}},
	{name: "asking for patience", fastest: 20 * time.Millisecond, longest: time.Second, odds: map[string]float64{"429 after": 0.3, "503 after": 0.3}},
	{name: "a bit of all", fastest: 20 * time.Millisecond, longest: 3 * time.Second, odds: map[string]float64{"500": 0.06, "503": 0.06, "hang": 0.06, "400 scope": 0.06, "401": 0.06, "garbage": 0.06, "unreachable": 0.06, "429": 0.06, "503 after": 0.03}},
}

func simWeatherOf(name string) *simWeather {
	for i := range simWeathers {
		if simWeathers[i].name == name {
			return &simWeathers[i]
		}
	}
	panic(name)
}

// simLives are the ways in which an endpoint reports lifetimes.
type simLives struct {
	name    string
	shapes  []string
	seconds []int
	repeat  bool // the previous token is returned again until shortly before it expires
}

var simLifes = []simLives{
	{name: "hours", shapes: []string{"int"}, seconds: []int{3600, 7200}},
	{name: "minutes", shapes: []string{"int", "string", "float"}, seconds: []int{60, 90, 300, 600}},
	{name: "mixed", shapes: []string{"int"}, seconds: []int{20, 60, 600, 3600}},
	{name: "seconds", shapes: []string{"int"}, seconds: []int{1, 2, 3, 5, 8, 12, 20}},
	{name: "odd", shapes: []string{"int", "string", "float", "time", "absent", "null", "zero", "negative", "jwt sooner", "jwt", "jwt later"}, seconds: []int{45, 300, 1800}},
	{name: "endless", shapes: []string{"int", "jwt"}, seconds: []int{3600, 20 * 365 * 24 * 3600}},
	{name: "repeated", shapes: []string{"int"}, seconds: []int{60, 300, 1200}, repeat: true},
}

// simToken is a token that the endpoint returned once or more often.
type simToken struct {
	text    string
	key     string // what was requested, by which the endpoint may return it again
	end     time.Duration
	answers []*simAnswer
	loaded  []*simAnswer // of nodes that found it in storage
}

// on returns the answers with the token that a node got.
func (t *simToken) on(n *simNode) []*simAnswer {
	var on []*simAnswer
	for _, a := range slices.Concat(t.answers, t.loaded) {
		if a.mint.node == n && a.mint.end >= 0 {
			on = append(on, a)
		}
	}
	return on
}

// simAnswer is one answer with a token.
type simAnswer struct {
	token     *simToken
	mint      *simMint
	sent      time.Duration
	delivered time.Duration // when the engine got it; -1 before
	told      time.Duration // lifetime as the engine must understand it; 0 for none
	renewed   bool          // it was surely newer than the cached token
	wanted    bool          // it was read, or a read failed while it was cached
	served    time.Duration // when a read first got it; -1 before
	asOf      time.Duration // when the last read started that got it; -1 before

	again time.Duration // when it expires if storage says that the endpoint returned it again; -1 if not
	// The generations that it was stored with.
	roleGenerations, configGenerations []string
	fromStorage                        bool
	unasked                            bool // it came from storage without a reader
}

// simEndpoint is the endpoint of all configs.
type simEndpoint struct {
	weather simWeather
	victim  string // the role that odds apply to, with only
	lives   simLives
	clients float64           // share of clients that cannot be made
	secrets map[string]string // by client_id: the one that is accepted
	tokens  map[string]*simToken
	newest  map[string]*simToken // by what was requested
}

// simMint is one mint.
type simMint struct {
	node   *simNode
	config string // name
	entry  configEntry
	req    tokenRequest
	role   string // "" for a verification
	set    string // scopes, sorted
	begin  time.Duration
	end    time.Duration // -1 before it
	asked  time.Duration // when the engine called its client, before the wait for a turn
	exempt bool          // it may be a rotation's
	tries  []*simTry
	answer *simAnswer // with the token, nil for none
}

func (m *simMint) key() string { return m.role + "/" + m.set }

// told returns the endpoint's description of the mint.
func (m *simMint) told() string { return simTold(m.role, m.set) }

func simTold(role, set string) string { return "about (" + role + "/" + set + ")" }

// asks returns what the mint requests, from which endpoint, as which client.
func (m *simMint) asks() string {
	return strings.Join([]string{m.entry.TokenURL, m.entry.ClientID, m.req.audience, m.set, m.req.extra["tenant"]}, "|")
}

func (m *simMint) String() string {
	return fmt.Sprintf("%s mint of %s [%s] with %s %s", m.node.name, m.role, m.set, m.entry.ClientID, m.entry.ClientSecret[:simSecretShown])
}

// simTry is one token request.
type simTry struct {
	sent    time.Duration
	ended   time.Duration // -1 before it
	outcome simOutcome
	cut     bool // the client gave up before the answer
}

type (
	simMintKey struct{}
	simOpKey   struct{}
)

// simClient is the engine's client: the real one over the simulated endpoint.
type simClient struct {
	node  *simNode
	entry configEntry
	real  *tokenClient
}

var errSimClient = errors.New("simulated failure to make a client")

// newClient is the engine's clientFactory on a node.
func (n *simNode) newClient(config *configEntry) (minter, error) {
	w := n.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if n.cut {
		return nil, errSimDied
	}
	w.count()
	if !w.clientMayBeMade(n, config) {
		return nil, errSimClient
	}
	c := &simClient{node: n, entry: *config}
	c.real = newTokenClientOver(config, "", func(context.Context) http.RoundTripper { return &simTransport{n} })
	c.real.random = w.random
	return c, nil
}

func (c *simClient) mint(ctx context.Context, req tokenRequest, leave departures) (*token, error) {
	w := c.node.w
	d := &simDepartures{departures: leave, client: c, req: req, asked: w.now()}
	defer c.node.asks(req)()
	tok, err := c.real.mint(context.WithValue(ctx, simMintKey{}, d), req, d)
	w.mu.Lock()
	defer w.mu.Unlock()
	if c.node.cut {
		return nil, errSimDied
	}
	if d.mint == nil {
		return tok, err // no request left
	}
	d.mint.end = w.now()
	if tok != nil {
		c.node.minted = append(c.node.minted, weak.Make(tok))
	}
	w.mintEnds(d.mint, err)
	return tok, err
}

// simAsk is a call of the engine's client for a token. Its request may wait for a turn
// first.
type simAsk struct {
	role, set string
	begin     time.Duration
	end       time.Duration // -1 before it
}

// asks records that the engine calls its client for a token. The caller must call over when
// the client has returned.
func (n *simNode) asks(req tokenRequest) (over func()) {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	j := &n.judge
	ask := &simAsk{role: simRoleOf(req.audience), set: simSet(req.scopes), begin: n.w.now(), end: -1}
	j.asks = append(j.asks, ask)
	return func() {
		n.w.mu.Lock()
		defer n.w.mu.Unlock()
		ask.end = n.w.now()
		j.asks = slices.DeleteFunc(j.asks, func(ask *simAsk) bool {
			return ask.end >= 0 && ask.end < n.w.now()-2*time.Minute // no read lasts that long
		})
	}
}

// simDepartures observes the gate from the client's side. A mint begins when its request
// leaves.
type simDepartures struct {
	departures
	client *simClient
	req    tokenRequest
	mint   *simMint // nil before, and after a 429
	again  bool     // it was throttled
	asked  time.Duration
	sent   int // requests sent before the one that may leave now
}

func (d *simDepartures) wait(ctx context.Context) error {
	if err := d.departures.wait(ctx); err != nil {
		return err
	}
	c := d.client
	w := c.node.w
	w.mu.Lock()
	defer w.mu.Unlock()
	d.sent = 0
	if d.mint != nil {
		d.sent = len(d.mint.tries)
		return nil
	}
	if c.node.cut {
		return errSimDied
	}
	d.mint = &simMint{
		node: c.node, config: simConfigOf(c.entry.ClientID), entry: c.entry, req: d.req, begin: w.now(), end: -1,
		role: simRoleOf(d.req.audience), set: simSet(d.req.scopes), asked: d.asked,
	}
	w.count()
	if d.mint.role == "" && d.again {
		return nil // a verification continues
	}
	w.mintBegins(d.mint)
	return nil
}

func (d *simDepartures) answered(how gate.Answer, retryAfter time.Duration) {
	w := d.client.node.w
	w.mu.Lock()
	if d.client.node.cut {
		w.mu.Unlock()
		d.departures.answered(how, retryAfter)
		return
	}
	o := &simTry{cut: true} // none was sent if the time was up at that moment
	if n := len(d.mint.tries); n > d.sent {
		o = d.mint.tries[n-1]
	}
	switch {
	case o.ended < 0 || o.cut:
	case (how == gate.Throttled) != o.outcome.throttled || retryAfter != o.outcome.after:
		w.violate("%s tells the gate %v and Retry-After %s after %s", d.mint, how, retryAfter, o.outcome.name)
	default:
		w.answered(d.mint, o.outcome)
	}
	if how == gate.Throttled {
		w.throttled(d.mint)
		d.mint, d.again = nil, true
	}
	w.mu.Unlock()
	d.departures.answered(how, retryAfter)
}

// simSet returns the name of a set of scopes.
func simSet(scopes []string) string {
	return strings.Join(slices.Sorted(slices.Values(scopes)), " ")
}

// simTransport is the wire between the engine's client and the endpoint.
type simTransport struct{ node *simNode }

func (s *simTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	w := s.node.w
	ctx := req.Context()
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if s.node.isCut() {
		return nil, errSimDied
	}
	d, _ := ctx.Value(simMintKey{}).(*simDepartures)
	if d == nil || d.mint == nil {
		panic("a request of no mint")
	}
	m := d.mint
	body, err := io.ReadAll(req.Body)
	if err != nil {
		return nil, err
	}
	form, err := url.ParseQuery(string(body))
	if err != nil {
		return nil, err
	}

	w.mu.Lock()
	w.count()
	try := &simTry{sent: w.now(), ended: -1}
	try.outcome = w.endpoint.plan(w, m, len(m.tries), form)
	w.tryBegins(m, try)
	m.tries = append(m.tries, try)
	w.mu.Unlock()

	if err := simWait(ctx, try.outcome.latency, try.outcome.hang); err != nil {
		w.mu.Lock()
		try.ended, try.cut = w.now(), true
		w.mu.Unlock()
		return nil, err
	}

	w.mu.Lock()
	defer w.mu.Unlock()
	try.ended = w.now()
	if s.node.cut {
		return nil, errSimDied
	}
	return w.endpoint.answer(w, m, try, req)
}

// simWait waits that long or, with hang, until the client gives up.
func simWait(ctx context.Context, d time.Duration, hang bool) error {
	if hang {
		<-ctx.Done()
		return ctx.Err()
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// plan decides how a request ends, by the weather at the time when it is sent.
func (e *simEndpoint) plan(w *simWorld, m *simMint, try int, form url.Values) simOutcome {
	dice := w.dice("request", m.node.name, m.key()+strconv.Itoa(try))
	name := "token"
	u := dice.Float64()
	weather := e.weather
	if !weather.only || weather.only && m.role == e.victim {
		for _, outcome := range slices.Sorted(maps.Keys(weather.odds)) {
			if u -= weather.odds[outcome]; u < 0 {
				name = outcome
				break
			}
		}
	}
	if name == "token" && form.Get("client_secret") != e.secrets[form.Get("client_id")] {
		name = "401"
	}
	o := simOutcomes[name]
	o.name = name
	if o.retryAfter {
		o.after = time.Duration(1+dice.IntN(30)) * time.Second
	}
	o.latency = weather.fastest + time.Duration(dice.Int64N(int64(weather.longest-weather.fastest)+1))
	return o
}

// answer builds the answer to a request.
func (e *simEndpoint) answer(w *simWorld, m *simMint, try *simTry, req *http.Request) (*http.Response, error) {
	o := try.outcome
	if o.status == 0 {
		return nil, errors.New("connection refused")
	}
	header := http.Header{"Content-Type": {"application/json"}}
	if o.location != "" {
		header.Set("Location", o.location)
	}
	if o.after > 0 {
		header.Set("Retry-After", strconv.Itoa(int(o.after/time.Second)))
	}
	text := o.body
	switch {
	case text != "":
	case o.name == "ended":
		text = simJSON(map[string]any{"access_token": simJWT("ended", w.at(w.now()-time.Minute)), "expires_in": 3600})
	case !o.failed():
		text = e.give(w, m, try)
	default:
		fields := map[string]any{"message": "no", "description": m.told()}
		if o.oauth != "" {
			fields = map[string]any{"error": o.oauth, "error_description": m.told()}
		}
		text = simJSON(fields)
	}
	body := io.NopCloser(strings.NewReader(text))
	switch {
	case o.broken:
		body = io.NopCloser(io.MultiReader(strings.NewReader(text), simReader(func() error { return io.ErrUnexpectedEOF })))
	case o.drip:
		body = io.NopCloser(simReader(func() error { return simWait(req.Context(), time.Second, false) }))
	case o.silent:
		body = &simSilence{closed: make(chan struct{})}
	}
	return &http.Response{
		StatusCode: o.status, Status: strconv.Itoa(o.status), Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: header, Body: body, ContentLength: -1, Request: req,
	}, nil
}

// simReader is a body that returns a space for each call that gives no error.
type simReader func() error

func (r simReader) Read(p []byte) (int, error) {
	if err := r(); err != nil {
		return 0, err
	}
	p[0] = ' '
	return 1, nil
}

// simSilence is the body of an answer that never ends. A read blocks until the body is
// closed, or for ten minutes.
type simSilence struct{ closed chan struct{} }

func (s *simSilence) Read([]byte) (int, error) {
	select {
	case <-s.closed:
	case <-time.After(10 * time.Minute):
	}
	return 0, io.ErrUnexpectedEOF
}

func (s *simSilence) Close() error {
	select {
	case <-s.closed:
	default:
		close(s.closed)
	}
	return nil
}

// give issues a token, or returns the previous one again.
func (e *simEndpoint) give(w *simWorld, m *simMint, try *simTry) string {
	dice := w.dice("token", m.node.name, m.key()+strconv.Itoa(len(m.tries)))
	now := w.now()
	answer := &simAnswer{mint: m, sent: try.sent, delivered: now, served: -1, asOf: -1, again: -1}
	m.answer = answer
	key := m.asks()
	if old := e.newest[key]; e.lives.repeat && old != nil && old.end-now >= 2*time.Second && dice.Float64() < 0.9 {
		left := (old.end - now) / time.Second
		answer.token, answer.told = old, min(left*time.Second, simLongestLife)
		old.answers = append(old.answers, answer)
		w.note("%s gets %s again, for %ds", m, old.text, left)
		return simJSON(map[string]any{"access_token": old.text, "expires_in": int64(left), "token_type": "bearer"})
	}

	shape := e.lives.shapes[dice.IntN(len(e.lives.shapes))]
	seconds := e.lives.seconds[dice.IntN(len(e.lives.seconds))]
	life := time.Duration(seconds) * time.Second
	// It is issued at some time between the request and the answer.
	issued := try.sent + time.Duration(dice.Int64N(int64(now-try.sent)+1))
	tok := &simToken{text: fmt.Sprintf("tok-%s-%x", m.node.name, dice.Uint64()), key: key, end: issued + life, answers: []*simAnswer{answer}}
	answer.token, answer.told = tok, life
	fields := map[string]any{"expires_in": seconds}
	switch shape {
	case "string":
		fields["expires_in"] = strconv.Itoa(seconds)
	case "float":
		fields["expires_in"] = json.RawMessage(strconv.Itoa(seconds) + ".0")
	case "time":
		fields["expires_in"] = w.at(try.sent + life).UTC().Format(time.RFC3339Nano)
		tok.end = try.sent + life
	case "absent":
		delete(fields, "expires_in")
	case "null":
		fields["expires_in"] = nil
	case "zero":
		fields["expires_in"] = 0
	case "negative":
		fields["expires_in"] = -5
	case "jwt sooner", "jwt", "jwt later":
		exp := w.at(issued + life).Truncate(time.Second)
		switch shape {
		case "jwt sooner":
			fields["expires_in"] = seconds * 3
		case "jwt later":
			exp = exp.Add(time.Hour)
		case "jwt":
			delete(fields, "expires_in")
		}
		if shape != "jwt later" {
			tok.end = exp.Sub(w.start)
			answer.told = tok.end - try.sent
		}
		tok.text = simJWT(tok.text, exp)
	}
	switch shape {
	case "absent", "null", "zero", "negative":
		answer.told, tok.end = 0, -1
	}
	answer.told = min(answer.told, simLongestLife)
	fields["access_token"] = tok.text
	e.tokens[tok.text], e.newest[key] = tok, tok
	w.note("%s gets %s, %s of %ds", m, tok.text, shape, seconds)
	return simJSON(fields)
}

func simJSON(fields map[string]any) string {
	text, err := json.Marshal(fields)
	if err != nil {
		panic(err)
	}
	return string(text)
}

// simJWT returns what looks like a signed JWT that expires at that time.
func simJWT(id string, exp time.Time) string {
	part := base64.RawURLEncoding.EncodeToString
	return part([]byte(`{"alg":"none"}`)) + "." + part([]byte(fmt.Sprintf(`{"jti":%q,"exp":%d}`, id, exp.Unix()))) + "." + "sig"
}

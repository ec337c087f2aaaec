// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package oauthserver

import (
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// ask sends a token request to the server, and returns the response.
func ask(t *testing.T, s *Server) *httptest.ResponseRecorder {
	t.Helper()
	form := url.Values{"grant_type": {"client_credentials"}, "client_id": {"client"}, "client_secret": {"secret"}}
	r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, TokenPath, strings.NewReader(form.Encode()))
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	w := httptest.NewRecorder()
	s.ServeHTTP(w, r)
	return w
}

func newServer(t *testing.T) *Server {
	t.Helper()
	s, err := New(time.Hour, Client{ID: "client", Secret: "secret"})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// statuses returns the statuses of the requests so far.
func statuses(s *Server) (all []int) {
	for _, request := range s.Requests() {
		all = append(all, request.Status)
	}
	return all
}

func TestRateLimitHoldsInAnySecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t)
		s.SetFaults(Faults{RateLimit: 3})
		const ms = time.Millisecond
		began := time.Now()
		for _, c := range []struct {
			at     time.Duration
			status int
		}{
			{0, 200}, {600 * ms, 200}, {900 * ms, 200},
			{950 * ms, 429},  // three in the second before
			{1000 * ms, 200}, // the first is a second old
			{1100 * ms, 429}, // a new calendar second, but not a new window
			{1599 * ms, 429}, // refused requests do not count …
			{1600 * ms, 200}, // … otherwise this one would be refused
			{5000 * ms, 200}, // an idle time …
			{5001 * ms, 200},
			{5002 * ms, 200},
			{5003 * ms, 429},        // … does not add to the limit
			{5999*ms + 999999, 429}, // a nanosecond too early
			{6000 * ms, 200},        //
		} {
			time.Sleep(time.Until(began.Add(c.at)))
			answer := ask(t, s)
			if answer.Code != c.status {
				t.Errorf("after %s: status %d, want %d", c.at, answer.Code, c.status)
			}
			if got := answer.Header().Get("Retry-After"); got != "" {
				t.Errorf("after %s: Retry-After %q, want none", c.at, got)
			}
		}
	})
}

func TestRateLimitTellsWhenToComeBack(t *testing.T) {
	s := newServer(t)
	s.SetFaults(Faults{RateLimit: 1, RetryAfter: 7})
	if answer := ask(t, s); answer.Code != 200 || answer.Header().Get("Retry-After") != "" {
		t.Errorf("within the limit: status %d, Retry-After %q", answer.Code, answer.Header().Get("Retry-After"))
	}
	answer := ask(t, s)
	body := answer.Body.String()
	if answer.Code != 429 || answer.Header().Get("Retry-After") != "7" || strings.Contains(body, "access_token") {
		t.Errorf("beyond the limit: status %d, Retry-After %q, body %s", answer.Code, answer.Header().Get("Retry-After"), body)
	}
	if got := len(s.Issued()); got != 1 {
		t.Errorf("%d tokens were issued, want 1", got)
	}
}

func TestRequestsTellHowTheyWereAnswered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t)
		ask(t, s)
		s.SetFaults(Faults{RateLimit: 1, Latency: Duration(time.Second / 2)})
		ask(t, s)
		go ask(t, s)
		synctest.Wait()
		if got := statuses(s); !slices.Equal(got, []int{200, 200, 0}) {
			t.Errorf("with one in progress: got %v", got)
		}
		time.Sleep(time.Second)
		s.SetFaults(Faults{Status: 503})
		ask(t, s)
		if got := statuses(s); !slices.Equal(got, []int{200, 200, 429, 503}) {
			t.Errorf("at the end: got %v", got)
		}
		if got := Refused(s.Requests()); got != 1 {
			t.Errorf("got %d refused, want 1", got)
		}
	})
}

func TestPeakIsOfAnySecond(t *testing.T) {
	at := func(times ...int) (requests []Request) {
		began := time.Now()
		for _, ms := range times {
			requests = append(requests, Request{At: began.Add(time.Duration(ms) * time.Millisecond)})
		}
		return requests
	}
	for _, c := range []struct {
		times []int
		want  int
	}{
		{nil, 0},
		{[]int{0}, 1},
		{[]int{0, 999}, 2},
		{[]int{0, 1000}, 1},
		{[]int{0, 700, 800, 1500, 1699, 1700}, 4}, // not by the calendar
		{[]int{0, 0, 0, 5000, 5000}, 3},
	} {
		if got := Peak(at(c.times...)); got != c.want {
			t.Errorf("%v ms: got %d, want %d", c.times, got, c.want)
		}
	}
}

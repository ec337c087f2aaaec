// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package oauthserver

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"strconv"
	"time"
)

// FaultsPath is where to read and set faults while the server runs: GET, PUT with a JSON
// object of Faults, DELETE to remove all faults.
const FaultsPath = "/faults"

// Faults describes how the token endpoint misbehaves. The zero value has no faults. The
// server still checks clients, scopes and audiences if a fault changes a response, but
// not if it replaces it.
type Faults struct {
	// Requests is the number of requests that the faults apply to; 0 means all.
	Requests int `json:"requests,omitempty"`
	// Latency delays each response, such as by "500ms".
	Latency Duration `json:"latency,omitempty"`
	// Hang accepts a request and never answers.
	Hang bool `json:"hang,omitempty"`
	// Drop closes the connection: "before" the response, or in its "body".
	Drop string `json:"drop,omitempty"`
	// Status replaces the response with one that has this status, Header and Body.
	Status int               `json:"status,omitempty"`
	Header map[string]string `json:"header,omitempty"`
	Body   string            `json:"body,omitempty"`
	// BodySize is the number of junk bytes after Body.
	BodySize int `json:"body_size,omitempty"`
	// Gzip compresses the body.
	Gzip bool `json:"gzip,omitempty"`
	// Fields are set in successful responses; null removes a field.
	Fields map[string]json.RawMessage `json:"fields,omitempty"`
	// RateLimit is the number of requests allowed in any second. Requests beyond it get a
	// 429, and do not count toward it.
	RateLimit int `json:"rate_limit,omitempty"`
	// RetryAfter is the Retry-After of these 429s, in seconds; 0 means none.
	RetryAfter int `json:"retry_after,omitempty"`
}

// Duration is a time.Duration that is "1.5s" in JSON.
type Duration time.Duration

// MarshalText returns the form that time.ParseDuration reads.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// UnmarshalText accepts what time.ParseDuration does.
func (d *Duration) UnmarshalText(text []byte) error {
	parsed, err := time.ParseDuration(string(text))
	*d = Duration(parsed)
	return err
}

// SetFaults makes the token endpoint misbehave from now on.
func (s *Server) SetFaults(f Faults) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = f
	s.faultsLeft = f.Requests
}

// takeFaults returns the faults for a request that arrived at the given time. The caller
// holds s.mu.
func (s *Server) takeFaults(at time.Time) Faults {
	f := s.faults
	if f.Requests > 0 {
		if s.faultsLeft--; s.faultsLeft == 0 {
			s.faults = Faults{}
		}
	}
	if f.RateLimit > 0 {
		if n := len(s.taken); n >= f.RateLimit && at.Sub(s.taken[n-f.RateLimit]) < time.Second {
			return f.refusal()
		}
		s.taken = append(s.taken[max(0, len(s.taken)-f.RateLimit):], at)
	}
	return f
}

// refusal returns the faults for a request beyond the rate limit.
func (f Faults) refusal() Faults {
	refusal := Faults{Latency: f.Latency, Status: http.StatusTooManyRequests, Body: `{"error":"slow_down"}`}
	if f.RetryAfter > 0 {
		refusal.Header = map[string]string{"Retry-After": strconv.Itoa(f.RetryAfter)}
	}
	return refusal
}

func (s *Server) faultsEndpoint(w http.ResponseWriter, r *http.Request) {
	switch r.Method {
	case http.MethodPut:
		var f Faults
		decoder := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<20))
		decoder.DisallowUnknownFields()
		if err := decoder.Decode(&f); err != nil {
			http.Error(w, "invalid faults: "+err.Error(), http.StatusBadRequest)
			return
		}
		if f.RateLimit < 0 || f.RetryAfter < 0 {
			http.Error(w, "rate_limit and retry_after must not be negative", http.StatusBadRequest)
			return
		}
		if f.Drop != "" && f.Drop != "before" && f.Drop != "body" {
			http.Error(w, `drop must be "before" or "body"`, http.StatusBadRequest)
			return
		}
		s.SetFaults(f)
	case http.MethodDelete:
		s.SetFaults(Faults{})
	}
	s.mu.Lock()
	f := s.faults
	s.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(f)
}

// misbehave answers a token request with the faults; well answers it without.
func (f Faults) misbehave(w http.ResponseWriter, r *http.Request, well http.HandlerFunc) {
	if f.Hang {
		<-r.Context().Done()
		return
	}
	if f.Latency > 0 {
		select {
		case <-time.After(time.Duration(f.Latency)):
		case <-r.Context().Done():
			return
		}
	}
	if f.Drop == "before" {
		panic(http.ErrAbortHandler)
	}

	status, header, body := f.Status, http.Header{}, []byte(f.Body)
	if status == 0 {
		recorder := httptest.NewRecorder()
		well(recorder, r)
		status, header, body = recorder.Code, recorder.Header(), f.changeFields(recorder.Body.Bytes())
	}
	maps.Copy(w.Header(), header)
	for name, value := range f.Header {
		w.Header().Set(name, value)
	}
	var out io.Writer = w
	switch {
	case f.Gzip:
		w.Header().Set("Content-Encoding", "gzip")
		zip := gzip.NewWriter(w)
		defer zip.Close()
		out = zip
	case f.Drop == "body":
		w.Header().Set("Content-Length", strconv.Itoa(len(body)+1))
	}
	w.WriteHeader(status)
	_, _ = out.Write(body)
	junk := bytes.Repeat([]byte("x"), 64<<10)
	for left := f.BodySize; left > 0; left -= len(junk) {
		if _, err := out.Write(junk[:min(left, len(junk))]); err != nil {
			return
		}
	}
	if f.Drop == "body" {
		panic(http.ErrAbortHandler)
	}
}

func (f Faults) changeFields(body []byte) []byte {
	var fields map[string]json.RawMessage
	if len(f.Fields) == 0 || json.Unmarshal(body, &fields) != nil || fields["access_token"] == nil {
		return body
	}
	for name, value := range f.Fields {
		if string(value) == "null" {
			delete(fields, name)
		} else {
			fields[name] = value
		}
	}
	changed, err := json.Marshal(fields)
	if err != nil {
		panic(fmt.Sprintf("fields that were JSON before: %v", err))
	}
	return changed
}

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

// FaultsPath is where faults are seen and set while the server runs: GET, PUT with
// a JSON object of Faults, DELETE to be well again.
const FaultsPath = "/faults"

// Faults is how the token endpoint misbehaves. The zero value is a server that is
// well. Clients, scopes and audiences are still checked where an answer is changed
// and not replaced.
type Faults struct {
	// Requests is how many requests the faults are for; 0 is all.
	Requests int `json:"requests,omitempty"`
	// Latency is how long an answer takes, such as "500ms".
	Latency Duration `json:"latency,omitempty"`
	// Hang takes a request and never answers.
	Hang bool `json:"hang,omitempty"`
	// Drop breaks the connection: "before" the answer, or in the "body".
	Drop string `json:"drop,omitempty"`
	// Status answers with this status instead, and with Header and Body.
	Status int               `json:"status,omitempty"`
	Header map[string]string `json:"header,omitempty"`
	Body   string            `json:"body,omitempty"`
	// BodySize is how many bytes of junk follow Body.
	BodySize int `json:"body_size,omitempty"`
	// Gzip compresses the body.
	Gzip bool `json:"gzip,omitempty"`
	// Fields are set in the answers that grant a token; null takes a field out.
	Fields map[string]json.RawMessage `json:"fields,omitempty"`
}

// Duration is a time.Duration that JSON holds as "1.5s".
type Duration time.Duration

// MarshalText gives the form that time.ParseDuration reads.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// UnmarshalText reads what time.ParseDuration does.
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

// takeFaults is how the server misbehaves for the next request.
func (s *Server) takeFaults() Faults {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.faults
	if f.Requests > 0 {
		if s.faultsLeft--; s.faultsLeft == 0 {
			s.faults = Faults{}
		}
	}
	return f
}

func (s *Server) faultsEndpoint(w http.ResponseWriter, r *http.Request) {
	switch r.Method {
	case http.MethodPut:
		var f Faults
		decoder := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<20))
		decoder.DisallowUnknownFields()
		if err := decoder.Decode(&f); err != nil {
			http.Error(w, "not the faults this server knows: "+err.Error(), http.StatusBadRequest)
			return
		}
		if f.Drop != "" && f.Drop != "before" && f.Drop != "body" {
			http.Error(w, `drop may be "before" or "body"`, http.StatusBadRequest)
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

// misbehave answers a token request as the faults say; well is how the request is
// answered otherwise.
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

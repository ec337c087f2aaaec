// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

// Package oauthserver is an OAuth 2.0 authorization server for tests and for trying the
// engine without a MojoAuth account, with a small API that its tokens protect.
//
// It stands in for MojoAuth's token endpoint; it was not compared with MojoAuth itself.
// github.com/ory/fosite implements the protocol: it authenticates clients, checks scopes
// and audiences, and creates the errors. The tokens are JWTs signed with RS256.
//
//	POST /oauth2/token                      client credentials grant (RFC 6749 §4.4)
//	GET  /.well-known/openid-configuration  the endpoints (OpenID Connect Discovery 1.0)
//	GET  /.well-known/jwks.json             the public key (RFC 7517)
//	GET  /data                              the protected API
//	GET  /healthz                           204 when the server is ready
//	PUT  /faults                            misbehave: see Faults
package oauthserver

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v3"
	josejwt "github.com/go-jose/go-jose/v3/jwt"
	"github.com/ory/fosite"
	"github.com/ory/fosite/compose"
	"github.com/ory/fosite/handler/oauth2"
	"github.com/ory/fosite/storage"
	"github.com/ory/fosite/token/jwt"
)

// Paths of the endpoints.
const (
	TokenPath = "/oauth2/token"
	JWKSPath  = "/.well-known/jwks.json"
	// DiscoveryPath is MojoAuth's path too, by its documentation.
	DiscoveryPath = "/.well-known/openid-configuration"
	DataPath      = "/data"
	HealthPath    = "/healthz"
)

// What the protected API requires of a token.
const (
	DataAudience = "https://api.example.org/"
	DataScope    = "read:data"
)

// Client is a machine-to-machine application registered at the server.
type Client struct {
	ID        string
	Secret    string // at most 72 bytes: stored as a bcrypt hash
	Audiences []string
	Scopes    []string
	Lifetime  time.Duration // of its tokens; 0 means the server's
}

// Request is a token request as received.
type Request struct {
	At     time.Time // when it had arrived completely
	Status int       // of the response; 0 until there is one
	Method string
	Query  string // not decoded
	Header http.Header
	Body   string // not decoded
}

// Server is the authorization server and the API. Create it with New, and run it with
// Start or as an http.Handler.
type Server struct {
	mux      *http.ServeMux
	provider fosite.OAuth2Provider
	config   *fosite.Config
	key      jose.JSONWebKey
	lifetime atomic.Int64 // of new tokens, in nanoseconds
	padding  atomic.Int64 // additional bytes in each token

	mu       sync.Mutex
	clients  map[string]*client
	requests []*Request
	issued   []string
	faults   Faults
	// faultsLeft is the number of requests that the faults still apply to.
	faultsLeft int
	// taken has the times of the last requests within the rate limit.
	taken []time.Time

	http *http.Server
	url  string
}

// New creates a server with the given clients. Its tokens are valid for lifetime.
func New(lifetime time.Duration, clients ...Client) (*Server, error) {
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, err
	}
	s := &Server{
		mux:     http.NewServeMux(),
		clients: make(map[string]*client),
		key:     jose.JSONWebKey{Key: private, KeyID: "1", Algorithm: string(jose.RS256), Use: "sig"},
		config: &fosite.Config{
			GlobalSecret:             []byte(rand.Text() + rand.Text()),
			HashCost:                 4, // enough for test secrets
			AccessTokenIssuer:        "https://oauth-server.test",
			ScopeStrategy:            fosite.ExactScopeStrategy,
			AudienceMatchingStrategy: fosite.ExactAudienceMatchingStrategy,
			JWTScopeClaimKey:         jwt.JWTScopeFieldString,
		},
	}
	s.SetLifetime(lifetime)
	for _, c := range clients {
		if err := s.SetClient(c); err != nil {
			return nil, err
		}
	}

	signingKey := func(context.Context) (any, error) { return &s.key, nil }
	s.provider = compose.Compose(s.config, &store{storage.NewMemoryStore(), s},
		compose.NewOAuth2JWTStrategy(signingKey, compose.NewOAuth2HMACStrategy(s.config), s.config),
		compose.OAuth2ClientCredentialsGrantFactory,
	)
	s.mux.HandleFunc("POST "+TokenPath, s.token)
	s.mux.HandleFunc("GET "+JWKSPath, s.jwks)
	s.mux.HandleFunc("GET "+DiscoveryPath, s.discovery)
	for _, method := range []string{http.MethodGet, http.MethodPut, http.MethodDelete} {
		s.mux.HandleFunc(method+" "+FaultsPath, s.faultsEndpoint)
	}
	s.mux.HandleFunc("GET "+DataPath, s.data)
	s.mux.HandleFunc("GET "+HealthPath, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	return s, nil
}

// client gives fosite's client a lifetime of its own, or the server's current one.
type client struct {
	*fosite.DefaultClient
	server   *Server
	lifetime time.Duration
}

func (c *client) GetEffectiveLifespan(fosite.GrantType, fosite.TokenType, time.Duration) time.Duration {
	if c.lifetime > 0 {
		return c.lifetime
	}
	return time.Duration(c.server.lifetime.Load())
}

// store is fosite's in-memory storage, except that clients may change while the server
// runs.
type store struct {
	*storage.MemoryStore
	server *Server
}

func (st *store) GetClient(_ context.Context, id string) (fosite.Client, error) {
	st.server.mu.Lock()
	defer st.server.mu.Unlock()
	if c := st.server.clients[id]; c != nil {
		return c, nil
	}
	return nil, fosite.ErrNotFound
}

// SetClient adds a client, or replaces the one with the same ID, as when a client secret
// is regenerated.
func (s *Server) SetClient(c Client) error {
	hash, err := (&fosite.BCrypt{Config: s.config}).Hash(context.Background(), []byte(c.Secret))
	if err != nil {
		return fmt.Errorf("client %q: %w", c.ID, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clients[c.ID] = &client{server: s, lifetime: c.Lifetime, DefaultClient: &fosite.DefaultClient{
		ID:         c.ID,
		Secret:     hash,
		GrantTypes: []string{"client_credentials"},
		Audience:   c.Audiences,
		Scopes:     c.Scopes,
	}}
	return nil
}

// SetLifetime sets the lifetime of new tokens.
func (s *Server) SetLifetime(d time.Duration) { s.lifetime.Store(int64(d)) }

// SetPadding makes new tokens about n bytes longer.
func (s *Server) SetPadding(n int) { s.padding.Store(int64(n)) }

// Requests returns the token requests so far, in order of arrival.
func (s *Server) Requests() []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	requests := make([]Request, len(s.requests))
	for i, request := range s.requests {
		requests[i] = *request
	}
	return requests
}

// Refused returns the number of requests that got a 429.
func Refused(requests []Request) (n int) {
	for _, request := range requests {
		if request.Status == http.StatusTooManyRequests {
			n++
		}
	}
	return n
}

// Peak returns the highest number of requests within a second. requests must be in order
// of arrival.
func Peak(requests []Request) (most int) {
	first := 0
	for i, request := range requests {
		for request.At.Sub(requests[first].At) >= time.Second {
			first++
		}
		most = max(most, i-first+1)
	}
	return most
}

// Issued returns the access tokens so far.
func (s *Server) Issued() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.issued)
}

func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.mux.ServeHTTP(w, r) }

// Start serves on the address, such as 127.0.0.1:0 for any free port.
func (s *Server) Start(address string) error {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	return s.serve(listener, "http")
}

// StartTLS is Start with TLS.
func (s *Server) StartTLS(address string, certificate tls.Certificate) error {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	return s.serve(tls.NewListener(listener, &tls.Config{Certificates: []tls.Certificate{certificate}, MinVersion: tls.VersionTLS12}), "https")
}

func (s *Server) serve(listener net.Listener, scheme string) error {
	s.url = scheme + "://" + listener.Addr().String()
	s.http = &http.Server{
		Handler:           s,
		ReadHeaderTimeout: 10 * time.Second,
		ErrorLog:          log.New(io.Discard, "", 0), // it misbehaves on purpose
	}
	go func() { _ = s.http.Serve(listener) }()
	return nil
}

// URL returns the server's URL without a path.
func (s *Server) URL() string { return s.url }

// TokenURL returns the URL of the token endpoint.
func (s *Server) TokenURL() string { return s.url + TokenPath }

// Close stops the server and closes its connections.
func (s *Server) Close() error {
	if s.http == nil {
		return nil
	}
	return s.http.Close()
}

func (s *Server) token(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 1<<20))
	if err != nil {
		http.Error(w, "unreadable body", http.StatusBadRequest)
		return
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	request := &Request{Method: r.Method, Query: r.URL.RawQuery, Header: r.Header.Clone(), Body: string(body)}
	s.mu.Lock()
	request.At = time.Now()
	s.requests = append(s.requests, request)
	faults := s.takeFaults(request.At)
	s.mu.Unlock()
	faults.misbehave(&noting{w, func(status int) {
		s.mu.Lock()
		defer s.mu.Unlock()
		request.Status = status
	}}, r, s.grant)
}

// noting reports the status of a response before sending it.
type noting struct {
	http.ResponseWriter
	note func(status int)
}

func (n *noting) WriteHeader(status int) {
	n.note(status)
	n.ResponseWriter.WriteHeader(status)
}

// grant answers a token request without faults.
func (s *Server) grant(w http.ResponseWriter, r *http.Request) {
	ctx := r.Context()
	session := &oauth2.JWTSession{JWTClaims: &jwt.JWTClaims{}, JWTHeader: &jwt.Headers{Extra: map[string]any{"kid": s.key.KeyID}}}
	access, err := s.provider.NewAccessRequest(ctx, r, session)
	if err != nil {
		s.provider.WriteAccessError(ctx, w, access, err)
		return
	}
	session.JWTClaims.Subject = access.GetClient().GetID()
	if n := int(s.padding.Load()); n > 0 {
		session.JWTClaims.Extra = map[string]any{"padding": strings.Repeat("x", n*3/4)} // before base64
	}
	for _, scope := range access.GetRequestedScopes() {
		access.GrantScope(scope)
	}
	for _, audience := range access.GetRequestedAudience() {
		access.GrantAudience(audience)
	}
	response, err := s.provider.NewAccessResponse(ctx, access)
	if err != nil {
		s.provider.WriteAccessError(ctx, w, access, err)
		return
	}
	s.mu.Lock()
	s.issued = append(s.issued, response.GetAccessToken())
	s.mu.Unlock()
	s.provider.WriteAccessResponse(ctx, w, access, response)
}

func (s *Server) jwks(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/jwk-set+json")
	_ = json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{s.key.Public()}})
}

// discovery lists the endpoints, and what the token endpoint supports.
func (s *Server) discovery(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]any{
		"issuer":                                s.url,
		"token_endpoint":                        s.TokenURL(),
		"jwks_uri":                              s.url + JWKSPath,
		"grant_types_supported":                 []string{"client_credentials"},
		"token_endpoint_auth_methods_supported": []string{"client_secret_post", "client_secret_basic"},
	})
}

// data is the protected API. It accepts a token for its audience and with its scope that
// is signed by a key in the JWKS and has not expired.
func (s *Server) data(w http.ResponseWriter, r *http.Request) {
	subject, err := s.authorize(r)
	w.Header().Set("Content-Type", "application/json")
	if err != nil {
		status, code := http.StatusUnauthorized, "invalid_token"
		if errors.Is(err, errScope) {
			status, code = http.StatusForbidden, "insufficient_scope"
		}
		// RFC 6750 §3.
		w.Header().Set("WWW-Authenticate", fmt.Sprintf("Bearer error=%q, error_description=%q", code, err))
		w.WriteHeader(status)
		_ = json.NewEncoder(w).Encode(map[string]string{"error": code, "error_description": err.Error()})
		return
	}
	_ = json.NewEncoder(w).Encode(map[string]string{"message": "hello " + subject})
}

var errScope = fmt.Errorf("the token does not have the scope %s", DataScope)

// authorize checks the request's bearer token (RFC 6750 §2.1, RFC 9068 §4) and
// returns its subject.
func (s *Server) authorize(r *http.Request) (subject string, err error) {
	bearer, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok {
		return "", errors.New("no bearer token")
	}
	token, err := josejwt.ParseSigned(bearer)
	if err != nil {
		return "", errors.New("the token is not a signed JWT")
	}
	keys, err := s.fetchJWKS(r.Context())
	if err != nil {
		return "", err
	}
	if len(token.Headers) != 1 || token.Headers[0].Algorithm != string(jose.RS256) {
		return "", errors.New("the token is not signed with RS256")
	}
	key := keys.Key(token.Headers[0].KeyID)
	if len(key) != 1 {
		return "", errors.New("the token is signed with an unknown key")
	}
	var claims josejwt.Claims
	var scope struct {
		Scope string `json:"scope"`
	}
	if err := token.Claims(key[0].Key, &claims, &scope); err != nil {
		return "", errors.New("the token's signature is invalid")
	}
	if claims.Expiry == nil {
		return "", errors.New("the token has no exp")
	}
	if err := claims.ValidateWithLeeway(josejwt.Expected{Audience: josejwt.Audience{DataAudience}, Time: time.Now()}, 0); err != nil {
		return "", err
	}
	if !slices.Contains(strings.Fields(scope.Scope), DataScope) {
		return "", errScope
	}
	return claims.Subject, nil
}

// fetchJWKS gets the keys over HTTP, as any API would.
func (s *Server) fetchJWKS(ctx context.Context) (*jose.JSONWebKeySet, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url+JWKSPath, nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	keys := &jose.JSONWebKeySet{}
	return keys, json.NewDecoder(resp.Body).Decode(keys)
}

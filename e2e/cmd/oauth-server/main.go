// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

// Command oauth-server runs the OAuth 2.0 server of package oauthserver with one client
// until it is interrupted. `make dev` uses it in place of MojoAuth.
package main

import (
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/oauthserver"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "oauth-server:", err)
		os.Exit(1)
	}
}

func run() error {
	listen := flag.String("listen", "127.0.0.1:0", "address to listen on; port 0 selects a free port")
	id := flag.String("client-id", "demo-client", "client ID")
	lifetime := flag.Duration("lifetime", 5*time.Minute, "lifetime of tokens")
	audiences := flag.String("audiences", oauthserver.DataAudience, "audiences the client may request, separated by commas")
	scopes := flag.String("scopes", oauthserver.DataScope+",write:data", "scopes the client may request, separated by commas")
	flag.Parse()

	// Not a flag: every user of the machine can read arguments.
	secret := os.Getenv("OAUTH_SERVER_CLIENT_SECRET")
	if secret == "" {
		return fmt.Errorf("set OAUTH_SERVER_CLIENT_SECRET to the client secret")
	}
	server, err := oauthserver.New(*lifetime, oauthserver.Client{
		ID:        *id,
		Secret:    secret,
		Audiences: strings.Split(*audiences, ","),
		Scopes:    strings.Split(*scopes, ","),
	})
	if err != nil {
		return err
	}
	if err := server.Start(*listen); err != nil {
		return err
	}
	fmt.Println(server.URL())

	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, os.Interrupt, syscall.SIGTERM)
	<-interrupted
	return server.Close()
}
